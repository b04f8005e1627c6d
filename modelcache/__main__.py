"""``python -m modelcache``."""

from __future__ import annotations

from modelcache.cli import main

if __name__ == "__main__":
    main()
