# The create path's first lines: compiled at every start, so as few as can be, and no more words than these.
# packaging/image.py says what an image is; without one, or with another Python's, modules are imported as usual.
# argv: how we were called, the runtime's arguments.  In a checkout this file is in packaging/bin.
# What is caught nowhere, too little memory above all, the launcher says, which needs less of it.
import gc
import marshal
import posix
import sys

sys.excepthook = lambda kind, *_: posix.execve(argv[0], argv, {**posix.environ, b"_failed": kind.__name__})
gc.disable()  # a create ends before it could pay; what compiles sources turns it on again
file, *argv = sys.argv
root = file.rpartition("/")[0].removesuffix("/packaging/bin")
sys.path.insert(0, root)
try:
    image = posix.open(f"{root}/create-{sys.implementation.cache_tag}.image", posix.O_CLOEXEC)
    load, magic, modules, late = marshal.loads(posix.read(image, 1 << 22))
    exec(load)
except (OSError, ValueError, EOFError, TypeError):
    pass
from shim.runtime.wrapper import main

main(argv)
