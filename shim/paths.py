"""Where things are.  The installation rewrites these constants when it is given other directories."""

from __future__ import annotations

CONFIG_DIR = "/etc/chandler"
STATE_DIR = "/run/chandler"
HOOK = "/usr/bin/chandler-hook"

VERSION = "0.1.0"

# For programs that Chandler starts and for hooks, in the place of their caller's environment.
SAFE_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
# Where Chandler itself looks for programs.  Never $PATH: containerd's ends in a colon, which means the working directory.
BINARY_DIRS = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
