"""A result folder: does what lies there belong to this run, what of it is finished, who is at work on it.

One record says so for every command. It holds the run's identity (what two calls must have in common for the
second to go on with the first), and the names of the finished parts, folds mostly. Each part under work has a
lock of its own; the record and what is made of all parts change under the folder's lock alone.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from internals import storage
from internals.errors import InputError, blaming

LOCK = ".lock"
FINISHED, SUMMARY = "finished", "summary"  # the record's list of finished parts; the last of them
PartKey = int | str  # a fold's number, or the name of another part


@dataclass(frozen=True)
class Files:
    """What a command writes into its folder. "{}" stands for a part's number."""

    record: str
    part: Sequence[str]  # a part is finished only while all of these are there
    beside: Sequence[str] = ()  # glob patterns of what else a part may consist of
    progress: Sequence[str] = ()  # what an unfinished part goes on from; removed once it is finished
    shared: Sequence[str] = ()  # files that grow with the parts
    summary: Sequence[str] = ()  # what is made of all parts
    facts: Sequence[str] = ()  # what the record says of each finished part: a dict by the part's number each

    def of(self, part: PartKey) -> list[str]:
        """Patterns of all that a part may consist of; "*" for any part."""
        return [name.format(part) for name in (*self.part, *self.beside, *self.progress)]

    def of_all(self) -> list[str]:
        """Patterns of all that is ever written; the record last."""
        return [*self.of("*"), *self.summary, *self.shared, self.record]


@dataclass
class ResultFolder:
    """A command's output folder, and which of its parts this call works on.

    Args:
        path: the folder, which need not exist.
        files: what is written there.
        parts: the numbers of all parts.
        identity: what two calls must have in common for the second to go on with the first.
        made_from: per part, facts that must be as they are given here, or it is not finished.
        chosen: the parts that this call works on; None for all.
        overwrite: whether to remove what is there first: all of it or, with `chosen`, those parts and what is
            made of all.
        implied: what records of earlier versions, which do not say it, mean.
    """

    path: Path
    files: Files
    parts: Sequence[PartKey]
    identity: Mapping[str, Any]
    made_from: Mapping[Any, Mapping[str, Any]] = field(default_factory=dict)
    chosen: Sequence[PartKey] | None = None
    overwrite: bool = False
    implied: Mapping[str, Any] = field(default_factory=dict)

    # Before any work ----------------------------------------------------------------------------

    def check(self, inspect: Callable[[Any], None] = lambda part: None) -> bool:
        """Whether the folder holds this very run to go on with, and not nothing. Writes nothing.

        Args:
            inspect: raises InputError where a finished part, which is kept, is damaged.

        Raises:
            InputError: the folder cannot be written to, holds another run, or results without a record.
        """
        found = self._find()
        if found:
            with self.locked():  # another process may remove parts of its own
                for part in self._kept(self._find()) - {SUMMARY}:
                    inspect(part)
        return bool(found)

    def is_finished(self) -> bool:
        """Whether all parts and what is made of them are finished and stay; raises InputError as `check`."""
        return not {*self.parts, SUMMARY} - self._kept(self._find())

    def _find(self) -> dict[str, Any]:
        """The record that is there and stays; empty where the run starts afresh."""
        existing = next(place for place in (self.path, *self.path.absolute().parents) if place.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise InputError(f"--outpath {self.path}: {existing} is not a folder that can be written to")
        removed = set(storage.matching(self.path, self._overwritten()))
        present = [path for path in storage.matching(self.path, self.files.of_all()) if path not in removed]
        if not present:
            return {}
        way_out = (
            f"choose another --outpath, or --overwrite{' without --run-folds' if self.overwrite else ''}"
        )
        record = self.path / self.files.record
        if record not in present:
            raise InputError(f"{present[0]} is in the way; {way_out}")
        found = storage.read_json(record)
        before, now = {**self.implied, **_flat(found)}, _flat(self.identity)
        differing = [f"{k} ({before.get(k)} there, {now[k]} now)" for k in now if before.get(k) != now[k]]
        if differing:
            raise InputError(f"{record} is of another run: {', '.join(differing)}; {way_out}")
        return found

    def _overwritten(self) -> list[str]:
        """Patterns of what --overwrite removes."""
        if not self.overwrite:
            return []
        if self.chosen is None:
            return self.files.of_all()
        return [*(name for part in self.chosen for name in self.files.of(part)), *self.files.summary]

    # At work ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def at_work(self, about: Mapping[str, Any]) -> Iterator[list[Any]]:
        """Hold the chosen parts, and begin in the folder or go on there.

        What is not finished, or is to be overwritten, is removed, and so is what was made of all parts.

        Args:
            about: what else the record says, and may change from call to call.

        Yields:
            The chosen parts that are not finished.

        Raises:
            InputError: as `check`; or another process is at work on one of the parts or, where all is to be
                overwritten, on any.
            Failure: the folder cannot be made or locked.
        """
        storage.make_folder(self.path)
        chosen = list(self.parts if self.chosen is None else self.chosen)
        with contextlib.ExitStack() as stack:
            for part in chosen:
                try:
                    stack.enter_context(storage.locked(self._lock(part), wait=False))
                except BlockingIOError as problem:
                    raise InputError(f"{self.path}: another process is at work on {_name(part)}") from problem
            with self.locked():
                missing = self._begin(chosen, about)
            yield missing

    def _lock(self, part: PartKey) -> Path:
        return self.path / f"{LOCK}-{_name(part).replace(' ', '_')}"

    def _begin(self, chosen: list[PartKey], about: Mapping[str, Any]) -> list[PartKey]:
        """Tidy up, remove what is to be made anew, write the record; returns the unfinished parts."""
        found, files = self._find(), self.files
        if self.overwrite and self.chosen is None:  # an earlier run may have had more parts
            others = set(self.path.glob(f"{LOCK}-*")) - {self._lock(part) for part in chosen}
            if any(storage.is_held(lock) for lock in others):
                raise InputError(f"--overwrite: another process is at work in {self.path}")
            for lock in others:  # of processes that died
                lock.unlink(missing_ok=True)
        mine = [name for part in chosen for name in files.of(part)]
        shared = [*files.summary, *files.shared, files.record]
        storage.remove_leftovers(self.path, [*mine, *self._overwritten(), *shared])
        storage.remove(self.path, self._overwritten())
        kept = self._kept(found)
        missing = [part for part in chosen if part not in kept]
        struck = [*missing, SUMMARY] if missing or SUMMARY not in kept else []
        record = {"versions": storage.package_versions(), **found, **about, **self.identity}
        # other processes' parts stay, even if they were made from what this one has not seen yet
        record[FINISHED] = [part for part in self._named(found) if part not in struck]
        for fact in files.facts:
            entries = storage.entry({fact: {}} | found, fact, dict)
            record[fact] = {key: entries[key] for key in entries if key not in map(str, missing)}
        if record != found:
            storage.write_json(record, self.path / files.record)
        for part in chosen:  # the progress of those that are missing stays
            names = files.progress if part in kept else [*files.part, *files.beside]
            storage.remove(self.path, [name.format(part) for name in names])
        if missing:
            storage.remove(self.path, files.summary)
        self.overwrite = False  # what was to go is gone; what comes now is to stay
        return missing

    def finish(self, part: PartKey, **facts: Any) -> None:
        """Say in the record that a part is finished, its files being there, and what is to be known of it."""
        with self.locked():
            self._enter(part, {**self.made_from.get(part, {}), **facts})
        storage.remove(self.path, [name.format(part) for name in self.files.progress])

    @contextlib.contextmanager
    def summary(self) -> Iterator[bool]:
        """Hold the folder; yields whether what is made of all parts is to be made now.

        It is, by the first of several processes to see all parts finished.
        """
        with self.locked():
            kept = self._kept(self._read())
            due = not set(self.parts) - kept and SUMMARY not in kept
            yield due
            if due:
                self._enter(SUMMARY, {})

    def unfinished(self) -> list[Any]:
        """The numbers of the parts that are not finished."""
        kept = self._kept(self._read())
        return [part for part in self.parts if part not in kept]

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder's shared files while they are read, changed and written back."""
        with storage.locked(self.path / LOCK):
            yield

    # The record ---------------------------------------------------------------------------------

    def _read(self) -> dict[str, Any]:
        return storage.read_json(self.path / self.files.record)

    def _kept(self, record: dict[str, Any]) -> set[PartKey]:
        """The parts, and SUMMARY, that are finished and not to be overwritten."""
        if not record:
            return set()
        with blaming(self.path / self.files.record):
            facts = {fact: storage.entry({fact: {}} | record, fact, dict) for fact in self.files.facts}

        def same(part: PartKey) -> bool:
            wanted = self.made_from.get(part, {})
            return all((str(part), value) in facts[fact].items() for fact, value in wanted.items())

        return {part for part in self._whole() & set(self._named(record)) if same(part)}

    def _named(self, record: dict[str, Any]) -> list[PartKey]:
        """The parts, and SUMMARY, that a record calls finished, whatever they were made from."""
        with blaming(self.path / self.files.record):
            # a record of an earlier version has no such list: there the files alone said so
            named = storage.entry(record, FINISHED, list) if FINISHED in record else self._whole()
        return [part for part in (*self.parts, SUMMARY) if part in named]

    def _whole(self) -> set[PartKey]:
        """The parts, and SUMMARY, whose files are all there and not to be overwritten."""
        names: dict[PartKey, Sequence[str]] = {SUMMARY: self.files.summary}
        names |= {part: [name.format(part) for name in self.files.part] for part in self.parts}
        removed = set(storage.matching(self.path, self._overwritten()))

        def there(name: str) -> bool:
            return (self.path / name).exists() and self.path / name not in removed

        return {part for part in names if all(there(name) for name in names[part])}

    def _enter(self, part: PartKey, facts: Mapping[str, Any]) -> None:
        """Enter a finished part into the record."""
        record = self._read()
        finished = [*self._named(record), part]
        record[FINISHED] = [name for name in (*self.parts, SUMMARY) if name in finished]
        for fact, value in facts.items():
            entries = {**record.get(fact, {}), str(part): value}
            record[fact] = {str(key): entries[str(key)] for key in self.parts if str(key) in entries}
        storage.write_json(record, self.path / self.files.record)


def _name(part: PartKey) -> str:
    """A part as people call it."""
    return f"fold {part}" if isinstance(part, int) else part


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with the items of its inner dicts at the top."""
    inner = {k: v for item in record.values() if isinstance(item, Mapping) for k, v in item.items()}
    return {k: v for k, v in record.items() if not isinstance(v, Mapping)} | inner
