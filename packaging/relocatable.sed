# For packaging/install: a program finds its code, and the interpreter of its environment, from its own path.  If
# readlink fails, it finds neither: it must not use the host's own directories.
/^_python=\/usr\/bin\/python3$/d
s|^_lib=$|_lib=$(/usr/bin/readlink -f -- "$0") \|\| _lib=/nonexistent/bin/chandler\
_python=/usr/bin/python3\
[ -x "${_lib%/*}/python3" ] \&\& _python=${_lib%/*}/python3\
_lib=${_lib%/bin/*}/lib/chandler|
