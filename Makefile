# Every target is a script that runs without make, too.
PREFIX ?= /usr
SYSCONFDIR ?= /etc
STATEDIR ?= /run/chandler
KEEPDIR ?= /var/lib/chandler
PYTHON ?= /usr/bin/python3

.PHONY: demo test quick unit bench install lint launcher deb rpm

demo:
	packaging/demo

# Everything: as root, it installs and fetches what the tests need.
test:
	tests/run

# No container and no machine is started.
quick:
	tests/run --quick

# These two need a Python that can make virtual environments, and make one; no root.
unit:
	PYTHON='$(PYTHON)' tests/run --unit

lint:
	PYTHON='$(PYTHON)' tests/run --lint

# Writes the options of shim/runtime/args.py into the launcher.
launcher:
	$(PYTHON) packaging/launcher.py

bench:
	tests/bench/run

install:
	DESTDIR='$(DESTDIR)' PREFIX='$(PREFIX)' SYSCONFDIR='$(SYSCONFDIR)' STATEDIR='$(STATEDIR)' KEEPDIR='$(KEEPDIR)' \
		PYTHON='$(PYTHON)' packaging/install

deb:
	packaging/build-deb

rpm:
	packaging/build-rpm
