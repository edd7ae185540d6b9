"""Runs `fkd-ssl` as `python -m fkd_ssl`."""

import sys

from fkd_ssl.cli import main

if __name__ == "__main__":
    sys.exit(main())
