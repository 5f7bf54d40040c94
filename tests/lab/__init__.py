"""What tests share: parts of a host, real runtimes and engines, fakes where nothing real can be had."""

from __future__ import annotations

import os

REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
