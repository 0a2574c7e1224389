"""The files and folders that a run writes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.dataset as ds

from stpm import storage
from stpm.errors import ConfigError, DataError, RunDamagedError
from stpm.scoring.options import OutputOptions
from stpm.scoring.resuming.run_state import RunState
from stpm.scoring.schema import OUTPUT

_RUNS = "runs"
# Without this a category named 007 would be read as a number.
_HIVE = ds.partitioning(pa.schema([("category", pa.string())]), flavor="hive")


@dataclass(frozen=True)
class RunOutput:
    """The output of one run: rows in `<folder>/scores/<name>_*.parquet`, heatmaps in `<folder>/heatmaps/<name>/`.

    Partitioned, the rows are in `<folder>/scores/category=<category>/<name>_*.parquet`.

    Args:
        folder: URI of the run folder.
        name: of the run, unique in the folder.
        state_folder: URI of the folder for run.json, the manifest and the checkpoints.
        options: what is written besides the rows.
    """

    folder: str
    name: str
    state_folder: str
    options: OutputOptions = field(default_factory=OutputOptions)

    @classmethod
    def single(cls, folder: str, options: OutputOptions | None = None) -> RunOutput:
        """Return the output of the only run of a folder."""
        return cls(folder, "scores", folder, options or OutputOptions())

    @classmethod
    def named(cls, folder: str, name: str, options: OutputOptions | None = None) -> RunOutput:
        """Return the output of one of several runs in a folder."""
        return cls(folder, name, storage.join(folder, _RUNS, name), options or OutputOptions())

    @classmethod
    def all_named(cls, folder: str) -> list[RunOutput]:
        """List the outputs of all named runs in a folder, by name."""
        parent = storage.join(folder, _RUNS)
        names = storage.subfolders(parent) if storage.exists(parent) else []
        return [cls.named(folder, name) for name in names]

    @classmethod
    def find_all(cls, folder: str) -> list[RunOutput]:
        """Find the outputs of all runs in a folder.

        Raises:
            DataError: if there are none.
        """
        if outputs := cls.all_named(folder):
            return outputs
        output = cls.single(folder)
        if not output.files():
            raise DataError(f"{folder}: no scores here; give the run folder of the score or benchmark job")
        return [output]

    @property
    def is_named(self) -> bool:
        """Whether it is one of several runs in its folder."""
        return self.state_folder != self.folder

    @property
    def scores(self) -> str:
        """The folder of the Parquet files."""
        return storage.join(self.folder, "scores")

    @property
    def heatmap_path(self) -> str:
        """The folder of the heatmaps, relative to the run folder."""
        return f"heatmaps/{self.name}"

    @property
    def heatmaps(self) -> str:
        """The folder of the heatmaps."""
        return storage.join(self.folder, self.heatmap_path)

    @property
    def manifest(self) -> str:
        """The folder of the manifest's shards."""
        return storage.join(self.state_folder, "manifest")

    @property
    def triage(self) -> str:
        """The page of the most anomalous images."""
        return storage.join(self.state_folder, "triage.html")

    @property
    def segments(self) -> str:
        """The folder of the summaries of committed segments."""
        return storage.join(self.state_folder, "segments")

    @property
    def checkpoints(self) -> str:
        """The folder of the ids and summaries of written rows, by segment; removed when the run is finished."""
        return storage.join(self.state_folder, "checkpoints")

    @property
    def remaining(self) -> str:
        """The folder of the manifest shards that a resumed run has yet to score; removed when it is finished."""
        return storage.join(self.state_folder, "remaining")

    def segment_summary(self, number: int) -> str:
        """The summary of a committed segment."""
        return storage.join(self.segments, f"{number:06}.json")

    def segment_checkpoints(self, number: int) -> str:
        """The folder of the ids and summaries of a segment's written rows."""
        return storage.join(self.checkpoints, f"{number:06}")

    def segment_remaining(self, number: int) -> str:
        """The folder of the shards of a segment that a resumed run has yet to score."""
        return storage.join(self.remaining, f"{number:06}")

    def segments_with_checkpoints(self) -> set[int]:
        """Return the numbers of the segments that have checkpoints."""
        if not storage.exists(self.checkpoints):
            return set()
        # In a store, the folder itself may be an object among its children.
        return {int(name) for name in storage.subfolders(self.checkpoints) if name.isdecimal()}

    def files(self) -> list[str]:
        """List the URIs of the Parquet files that the run wrote."""
        written = [uri for uri, _ in storage.files(self.scores)]
        return [uri for uri in written if uri.rsplit("/", 1)[-1].startswith(f"{self.name}_")]

    def dataset(self, columns: Collection[str] = (), files: Sequence[str] | None = None) -> ds.Dataset:
        """Open the rows that the run wrote, or those in some of its files.

        The footer of each file is read here, and not again when rows are read. Read these within `name_damaged_file`.

        Args:
            columns: that will be read.
            files: of the run; None: all.

        Raises:
            RunDamagedError: if the footer of a file is damaged, or it lacks a column or has one of another type.
        """
        filesystem, folder = storage.arrow_filesystem(self.scores)
        names = [uri.removeprefix(f"{self.scores}/") for uri in (self.files() if files is None else files)]
        with self.name_damaged_file(files):
            dataset = ds.dataset(
                [f"{folder}/{name}" for name in names],
                schema=None if names else OUTPUT,
                filesystem=filesystem,
                format="parquet",
                partitioning=_HIVE if any("/" in name for name in names) else None,
                partition_base_dir=folder,
            )
            # Arrow takes the first file's columns for those of all: it would read missing ones as null.
            problems = storage.in_parallel(lambda file: _find_problem(file, columns), dataset.get_fragments())
        for name, problem in zip(dataset.files, problems, strict=True):
            if problem:
                uri = storage.join(self.scores, name.removeprefix(f"{folder}/"))
                raise RunDamagedError(f"{uri} is not a file of rows: it has {problem}")
        return dataset

    def batches(
        self, columns: Sequence[str], chosen: ds.Expression | None = None, batch_size: int = 131_072
    ) -> Iterator[pa.RecordBatch]:
        """Read columns of the rows that the run wrote, a batch at a time.

        Args:
            columns: to read.
            chosen: condition for rows; None: all.
            batch_size: rows of a batch, at most.

        Raises:
            RunDamagedError: if a file is damaged, or has other columns.
        """
        with self.name_damaged_file():
            yield from self.dataset(columns).to_batches(list(columns), filter=chosen, batch_size=batch_size)

    def check_row_count(self) -> None:
        """Compare the number of rows in the files with that of the run, if it is finished. Reads footers alone.

        Raises:
            RunDamagedError: if rows are missing or doubled, or a file is damaged.
        """
        state = RunState(self.state_folder)
        if not state.is_finished():
            return
        rows = state.result().rows
        with self.name_damaged_file():
            found = self.dataset().count_rows()
        if found != rows:
            raise RunDamagedError(f"{found} rows in {self.scores}/{self.name}_*, where the run wrote {rows}")

    @contextmanager
    def name_damaged_file(self, files: Sequence[str] | None = None) -> Iterator[None]:
        """Replace an error of pyarrow, which seldom names the file, by one that does.

        After an error, read the files one by one: name those that were read, if they are not all.

        Raises:
            RunDamagedError: if a file of rows is damaged.
        """
        try:
            yield
        except (pa.ArrowException, OSError) as failure:
            for uri in self.files() if files is None else files:
                try:
                    storage.read_table(uri)
                except DataError as error:
                    raise RunDamagedError(str(error)) from error
            if isinstance(failure, pa.ArrowException):
                reason = " ".join(str(failure).split())
                raise RunDamagedError(f"{self.scores}: a file of rows is damaged: {reason}") from failure
            raise

    def existing(self) -> list[str]:
        """List the files and folders that exist under the names that the run writes to."""
        names = (self.manifest, self.segments, self.checkpoints, self.remaining, self.triage, self.heatmaps)
        return [*self.files(), *(uri for uri in names if storage.exists(uri))]

    def clear(self) -> None:
        """Remove all that earlier runs wrote here.

        Clear the run state first: the next run finds nothing to resume after a kill at any moment.

        Raises:
            ConfigError: if there are files, and no run.json shows that a run wrote them.
        """
        state = RunState(self.state_folder)
        existing = self.existing()
        if existing and not state.exists():
            raise ConfigError(f"{existing[0]} exists, but no {state.uri} shows that a run wrote it; name another --out")
        state.clear()
        for uri in existing:
            storage.remove(uri)

    def remove(self) -> None:
        """Remove all that runs wrote here, and then the mark that a run wrote it."""
        self.clear()
        RunState(self.state_folder).forget()

    def clear_checkpoints(self) -> None:
        """Remove the checkpoints, and the shards of remaining rows."""
        storage.remove(self.checkpoints)
        storage.remove(self.remaining)


def _find_problem(file: ds.ParquetFileFragment, columns: Collection[str]) -> str:
    """Say which column a file of rows should have and has not, "" if none.

    Args:
        file: whose footer is read.
        columns: of OUTPUT that are needed; it needs those without nulls in any case.
    """
    schema, in_path = file.physical_schema, ds.get_partition_keys(file.partition_expression)
    for column in OUTPUT:
        index = schema.get_field_index(column.name)
        if index >= 0 and schema.field(index).type != column.type:
            return f"a column {column.name} of type {schema.field(index).type}, not {column.type}"
        if index < 0 and column.name not in in_path and (column.name in columns or not column.nullable):
            return f"no column {column.name}"
    return ""
