"""The command `stpm compare`, for `ray job submit`."""

from stpm.commands import main

if __name__ == "__main__":
    main("compare")
