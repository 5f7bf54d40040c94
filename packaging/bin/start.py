# The create path's first lines: compiled at every start, so as few as can be.  argv: how we were called, the
# runtime's arguments.  packaging/image.py says what an image is; without one, or with another Python's, the modules
# are imported in the ordinary way.
import gc
import sys

gc.disable()  # a create ends before it could pay; what compiles sources turns it on again
root = sys.argv[0].rpartition("/")[0].removesuffix("/packaging/bin")  # the latter in a checkout
sys.path.insert(0, root)
try:
    import marshal
    import posix
    image = posix.open(f"{root}/create-{sys.implementation.cache_tag}.image", posix.O_CLOEXEC)
    data = posix.read(image, posix.fstat(image).st_size)
    posix.close(image)
    load, magic, modules = marshal.loads(data)
    exec(load)
except (OSError, ValueError, EOFError, TypeError):
    pass
from shim.runtime import main

main(sys.argv[1:])
