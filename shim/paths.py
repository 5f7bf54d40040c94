"""The directories and programs of this installation.  packaging/install rewrites these constants for other prefixes."""

from __future__ import annotations

CONFIG_DIR = "/etc/chandler"
STATE_DIR = "/run/chandler"
KEEP_DIR = "/var/lib/chandler"  # what must survive a reboot
HOOK = "/usr/bin/chandler-hook"

VERSION = "0.1.0"

# PATH for the programs that Chandler starts and for hooks, which do not get the caller's.
SAFE_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
# Where Chandler looks for programs.  Never $PATH: containerd's ends in a colon, which means the working directory.
BINARY_DIRS = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
