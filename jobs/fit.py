"""The command `stpm fit`, for `ray job submit`."""

from stpm.commands import main

if __name__ == "__main__":
    main("fit")
