"""Find defects in product images with student-teacher feature pyramid matching, as a distributed batch job."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("stpm")
except PackageNotFoundError:  # a working directory shipped to a cluster without being installed
    __version__ = "0+uninstalled"
