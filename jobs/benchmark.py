"""The command `stpm benchmark`, for `ray job submit`."""

from stpm.commands import main

if __name__ == "__main__":
    main("benchmark")
