# Every target is a script that runs without make, too.
PREFIX ?= /usr
SYSCONFDIR ?= /etc
STATEDIR ?= /run/chandler
PYTHON ?= /usr/bin/python3

.PHONY: demo test bench install lint deb rpm

demo:
	packaging/demo

test:
	tests/run

bench:
	tests/bench/run

install:
	DESTDIR='$(DESTDIR)' PREFIX='$(PREFIX)' SYSCONFDIR='$(SYSCONFDIR)' STATEDIR='$(STATEDIR)' PYTHON='$(PYTHON)' packaging/install

lint:
	tests/run tests/test_style.py

deb:
	packaging/build-deb

rpm:
	packaging/build-rpm
