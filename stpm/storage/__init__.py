"""Files and objects by URI, on local disks and in object stores, through fsspec."""

from stpm.storage.listing import Settle, file_sizes, file_versions, files, glob, iter_files, subfolders
from stpm.storage.objects import (
    FULL_DISK,
    check_size,
    create,
    digest,
    exists,
    publish,
    read,
    read_at_most,
    remove,
    remove_unfinished,
    sync,
    writing,
)
from stpm.storage.retries import as_os_errors, in_parallel
from stpm.storage.tables import decode_parquet, encode_parquet, read_columns, read_table
from stpm.storage.uris import absolute, arrow_filesystem, filesystem, is_local, join, output_folder
