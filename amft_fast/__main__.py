"""`python -m amft_fast` is `amft-fast`."""

from amft_fast.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
