"""A result folder: does what lies there belong to this run, what of it is finished, who is at work on it.

One record says so for every command. It holds the run's identity (what two calls must have in common for the
second to go on with the first), and the names of the finished parts, folds mostly. Each part under work has a
lock of its own; the record and what is made of all parts change under the folder's lock alone. Several
processes may share a part; each has a lock of its own then, and the last to finish puts the part together.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from internals import storage
from internals.errors import InputError, blaming
from internals.sharing import WHOLE, Share

LOCK = ".lock"
FINISHED, SUMMARY = "finished", "summary"  # the record's list of finished parts; the last of them
PARTS, SHARES = "parts", "shares"  # its list of all parts; how unfinished ones are shared,
DONE = "done"  # and the numbers of the shares that are done
PartKey = int | str  # a fold's number, or the name of another part


@dataclass(frozen=True)
class Files:
    """What a command writes into its folder.

    "{}" stands for a part's number; a second one, in `progress`, for a share of it, "-2of3", or nothing.
    """

    record: str
    part: Sequence[str]  # a part is finished only while all of these are there
    beside: Sequence[str] = ()  # glob patterns of what else may be made of a part, or of it and others
    progress: Sequence[str] = ()  # what an unfinished part goes on from; removed once it is finished
    shared: Sequence[str] = ()  # files that grow with the parts
    summary: Sequence[str] = ()  # what is made of all parts
    facts: Sequence[str] = ()  # what the record says of each finished part: a dict by the part's number each

    def of(self, part: PartKey) -> list[str]:
        """Patterns of all that a part may consist of; "*" for any part."""
        return [name.format(part) for name in (*self.part, *self.beside)] + self.progress_of(part)

    def progress_of(self, part: PartKey, *suffixes: str) -> list[str]:
        """Patterns of what a part goes on from: of the shares of some suffixes, or of any."""
        return [name.format(part, suffix) for name in self.progress for suffix in suffixes or ("", "-*")]

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
        share: which share of every chosen part this call works on; None where parts are not shared.
    """

    path: Path
    files: Files
    parts: Sequence[PartKey]
    identity: Mapping[str, Any]
    made_from: Mapping[Any, Mapping[str, Any]] = field(default_factory=dict)
    chosen: Sequence[PartKey] | None = None
    overwrite: bool = False
    implied: Mapping[str, Any] = field(default_factory=dict)
    share: Share | None = None

    @property
    def division(self) -> Share:
        """The share of every chosen part that this call works on, which may be the whole."""
        return self.share or WHOLE

    def progress_file(self, part: PartKey, share: Share) -> Path:
        """What a share of a part goes on from."""
        return self.path / self.files.progress_of(part, share.suffix)[0]

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

    def check_unchanged(self, fact: str, part: PartKey) -> None:
        """Raise InputError where a part's file is not the one whose SHA-256 is a fact of the record."""
        record, file = self.path / self.files.record, self.path / self.files.part[0].format(part)
        with blaming(record):
            digests = storage.entry(self._read(), fact, dict)
        if digests.get(str(part)) != storage.file_sha256(file):
            raise InputError(f"{file}: is not as it was written; --overwrite starts again")

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
            with self.locked():
                for part in chosen:
                    self._take(part, stack)
                missing = self._begin(chosen, about)
            yield missing

    def _take(self, part: PartKey, stack: contextlib.ExitStack) -> None:
        """Hold a part, or this call's share of it; InputError where somebody else does."""
        busy = f"{self.path}: another process is at work on {_name(part)}"
        others = [lock for lock, share in self._locks(part).items() if share.of != self.division.of]
        if any(storage.is_held(lock) for lock in others):
            raise InputError(f"{busy}, divided otherwise")
        try:
            stack.enter_context(storage.locked(self._lock(part, self.division), wait=False))
        except BlockingIOError as problem:
            raise InputError(busy) from problem

    def _lock(self, part: PartKey, share: Share) -> Path:
        """The lock file of a share of a part."""
        own = "" if share == WHOLE else f"_part_{share.number}_of_{share.of}"
        return self.path / f"{LOCK}-{_name(part).replace(' ', '_')}{own}"

    def _locks(self, part: PartKey) -> dict[Path, Share]:
        """The lock files of a part that are there, and the shares that they are of."""
        whole, locks = self._lock(part, WHOLE), {}
        for lock in self.path.glob(f"{whole.name}*"):
            match = re.fullmatch(r"(?:_part_(\d+)_of_(\d+))?", lock.name.removeprefix(whole.name))
            if match:
                locks[lock] = Share(int(match[1] or 1), int(match[2] or 1))
        return locks

    def _begin(self, chosen: list[PartKey], about: Mapping[str, Any]) -> list[PartKey]:
        """Tidy up, remove what is to be made anew, write the record; returns the unfinished parts."""
        found, files = self._find(), self.files
        if self.overwrite and self.chosen is None:  # an earlier run may have had more parts
            others = set(self.path.glob(f"{LOCK}-*")) - {self._lock(part, self.division) for part in chosen}
            if any(storage.is_held(lock) for lock in others):
                raise InputError(f"--overwrite: another process is at work in {self.path}")
            for lock in others:  # of processes that died
                lock.unlink(missing_ok=True)
        kept = self._kept(found)
        missing = [part for part in chosen if part not in kept]
        joined, shares = self._divide(found, missing, kept) if self.share else ([], {})
        alone = [part for part in chosen if self.division == WHOLE or part not in joined]
        shared = [*files.summary, *files.shared, files.record]
        leftovers = [name for part in alone for name in files.of(part)]
        storage.remove_leftovers(self.path, [*leftovers, *self._overwritten(), *shared])
        storage.remove(self.path, self._overwritten())
        goes_on = joined if self.share else missing  # from what progress there is
        stale = [part for part in chosen if part not in goes_on]
        # before the record says what it will be made from
        storage.remove(self.path, [name for part in stale for name in files.progress_of(part)])
        struck = [*missing, SUMMARY] if missing or SUMMARY not in kept else []
        record = {"versions": storage.package_versions(), **found, **about, **self.identity}
        record[PARTS] = list(self.parts)
        # other processes' parts stay, even if they were made from what this one has not seen yet
        record[FINISHED] = [part for part in self._named(found) if part not in struck]
        for fact in files.facts:
            entries = storage.entry({fact: {}} | found, fact, dict)
            record[fact] = {key: entries[key] for key in entries if key not in map(str, missing)}
        record = _with_shares(record, shares)
        if record != found:
            storage.write_json(record, self.path / files.record)
        for part in set(missing) - set(joined):
            storage.remove(self.path, [name.format(part) for name in (*files.part, *files.beside)])
        if missing:
            storage.remove(self.path, files.summary)
        self.overwrite = False  # what was to go is gone; what comes now is to stay
        return missing

    # Shares of a part ---------------------------------------------------------------------------

    def _divide(
        self, found: dict[str, Any], missing: list[PartKey], kept: set[PartKey]
    ) -> tuple[list[PartKey], dict[str, Any]]:
        """The missing parts of which others have shares, or this call had; and how the record says so."""
        shares = {key: of for key, of in self._shares(found).items() if key not in map(str, kept)}
        joined = []
        for part in missing:
            now = self._undone(part)
            # an earlier version, which did not divide, did not say so
            before = shares.get(str(part), now if self.division == WHOLE and not now["from"] else None)
            if before and not self.overwrite and {**before, DONE: []} == now:
                joined.append(part)
                shares[str(part)] = before
                continue
            self._begin_anew(part, before, now)
            shares[str(part)] = now
        return joined, shares

    def _undone(self, part: PartKey) -> dict[str, Any]:
        """How a record says that a part is divided as this call does it, and no share is done."""
        return {"of": self.division.of, DONE: [], "from": dict(self.made_from.get(part, {}))}

    def _begin_anew(self, part: PartKey, before: dict[str, Any] | None, now: dict[str, Any]) -> None:
        """Raise InputError where others are at work on a part, or finished shares of it would be lost."""
        others = set(self._locks(part)) - {self._lock(part, self.division)}
        if any(storage.is_held(lock) for lock in others):
            raise InputError(f"{self.path}: another process is at work on {_name(part)} of other weights")
        if not before or self.overwrite:
            return
        if before["from"] == now["from"] and (done := self._done(part, before)):
            number, of = len(done), before["of"]
            raise InputError(
                f"{self.path}: {_name(part)} is divided into {of} parts, {number} of them finished; "
                f"--part i/{of} goes on, --overwrite starts again"
            )
        print(f"{_name(part)}: was divided otherwise, or made from something else; begins again")

    def _shares(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """How unfinished parts are shared, by their names in a record."""
        with blaming(self.path / self.files.record):
            shares = storage.entry({SHARES: {}} | dict(record), SHARES, dict)
            for division in shares.values():
                storage.entry(division, "of", int, lambda of: 0 < of < 10**6)
                storage.entry(division, DONE, list, lambda done: all(isinstance(n, int) for n in done))
                storage.entry(division, "from", dict)
        return dict(shares)

    def _done(self, part: PartKey, division: Mapping[str, Any]) -> list[int]:
        """The shares of a part that are done, and whose progress is there."""
        shares = [Share(number, division["of"]) for number in division[DONE]]
        names = {share.number: self.files.progress_of(part, share.suffix) for share in shares}
        return [number for number in names if all((self.path / name).exists() for name in names[number])]

    def is_share_done(self, part: PartKey) -> bool:
        """Whether this call's share of a part is done, or the whole part is."""
        record = self._read()
        division = self._shares(record).get(str(part))
        done = division is not None and self.division.number in self._done(part, division)
        return done or part in self._kept(record)

    @contextlib.contextmanager
    def finish_share(self, part: PartKey) -> Iterator[dict[str, Any] | None]:
        """Say in the record that this call's share of a part is finished, its progress being saved.

        Yields:
            None; or, where no share is missing, a dict: then the part's files are to be made now, while the
            folder is held, and what the record is to say of the part goes into the dict.
        """
        with self.locked():
            record = self._read()
            if part in self._kept(record):  # another process was faster
                yield None
                return
            shares = self._shares(record)
            division = shares.setdefault(str(part), self._undone(part))
            done = self._done(part, division)
            division[DONE] = sorted({*done, self.division.number})
            storage.write_json(_with_shares(record, shares), self.path / self.files.record)
            facts: dict[str, Any] | None = {} if len(division[DONE]) == self.division.of else None
            yield facts
            if facts is not None:
                self._enter(part, {**self.made_from.get(part, {}), **facts})
                storage.remove_leftovers(self.path, self.files.of(part))
                storage.remove(self.path, self.files.progress_of(part))

    def finish(self, part: PartKey, **facts: Any) -> None:
        """Say in the record that a part is finished, its files being there, and what is to be known of it."""
        with self.locked():
            self._enter(part, {**self.made_from.get(part, {}), **facts})
        storage.remove(self.path, self.files.progress_of(part))

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

    def states(self) -> dict[str, str]:
        """What every part or share, and the summary, is: finished, running (somebody holds it) or open."""
        record, states = self._read(), {}
        kept = self._kept(record)
        for part in self.parts:
            held = {share for lock, share in self._locks(part).items() if storage.is_held(lock)}
            division = self._shares(record).get(str(part), {"of": 1, DONE: []})
            of, done = max([share.of for share in held], default=division["of"]), self._done(part, division)
            for number in range(1, of + 1):
                name = f"{_name(part)}, part {number} of {of}" if of > 1 and part not in kept else _name(part)
                is_done = part in kept or (of > 1 and number in done)
                states[name] = "finished" if is_done else "running" if Share(number, of) in held else "open"
        return states | {SUMMARY: "finished" if SUMMARY in self._named(record) else "open"}

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
        shares = {key: of for key, of in self._shares(record).items() if key != str(part)}
        record = _with_shares(record, shares)
        finished = [*self._named(record), part]
        record[FINISHED] = [name for name in (*self.parts, SUMMARY) if name in finished]
        for fact, value in facts.items():
            entries = {**record.get(fact, {}), str(part): value}
            record[fact] = {str(key): entries[str(key)] for key in self.parts if str(key) in entries}
        storage.write_json(record, self.path / self.files.record)


def states_of(path: Path, files: Files) -> dict[str, str]:
    """`ResultFolder.states` of what lies in a folder, whatever run it is of; empty where there is none."""
    if not (path / files.record).exists():
        return {}
    record = storage.read_json(path / files.record)
    with blaming(path / files.record):
        before = [part for part in storage.entry({FINISHED: []} | record, FINISHED, list) if part != SUMMARY]
        names = {PARTS: before} | record  # an earlier version does not say which parts there are
        parts = storage.entry(names, PARTS, list, lambda parts: all(isinstance(p, int | str) for p in parts))
    return ResultFolder(path, files, parts, {}).states()


def _with_shares(record: Mapping[str, Any], shares: Mapping[str, Any]) -> dict[str, Any]:
    """A record that says how unfinished parts are shared, where any is."""
    others = {name: value for name, value in record.items() if name != SHARES}
    return others | ({SHARES: shares} if shares else {})


def _name(part: PartKey) -> str:
    """A part as people call it."""
    return f"fold {part}" if isinstance(part, int) else part


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with the items of its inner dicts at the top."""
    inner = {k: v for item in record.values() if isinstance(item, Mapping) for k, v in item.items()}
    return {k: v for k, v in record.items() if not isinstance(v, Mapping)} | inner
