"""The checkpoints of a run: lock, resumption, saves in the background, rollback and retention."""

import contextlib
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import filelock
import jax

from transformer_jax.train import checkpoint_files, checkpointing
from transformer_jax.train.anomalies import BadStepError
from transformer_jax.train.step import TrainState
from transformer_jax.tree import flatten_paths

LOCK_FILE = "lock"


class DirectoryInUseError(OSError):
    """Another run holds the lock of a checkpoint directory."""


class Stateful(Protocol):
    """An object whose state is stored with a checkpoint, as JSON values."""

    def get_state(self) -> Any: ...
    def set_state(self, state: Any) -> None: ...


@contextlib.contextmanager
def directory_lock(directory: str | Path) -> Iterator[None]:
    """Context manager that holds an exclusive lock on a directory, which is created if missing.

    The operating system releases the lock when the process ends, even if it is killed. On network
    file systems without locks, `filelock` uses the existence of the lock file instead.

    Raises:
        DirectoryInUseError: another process holds the lock.
    """
    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    owner = root / f"{LOCK_FILE}.owner"  # the lock file itself may be truncated by others
    try:
        with filelock.FileLock(root / LOCK_FILE, timeout=0):
            owner.write_text(f"process {os.getpid()} on {platform.node()}\n")
            try:
                yield
            finally:
                owner.unlink(missing_ok=True)
    except filelock.Timeout:
        name = owner.read_text().strip() if owner.is_file() else "an unknown process"
        raise DirectoryInUseError(
            f"{directory} is in use by another run ({name}); wait until it ends, stop it, or "
            "choose another directory") from None


class Checkpointer:
    """The checkpoint directory of a run of `loop.fit`.

    Args:
        directory: the directory, which is locked against other runs; None saves no checkpoints.
        save_every: number of updates between checkpoints; 0 saves at the end of the run only.
        keep: number of most recent checkpoints to keep; None keeps all.
        keep_best: (metric of the evaluation, "min" or "max"): also keep the checkpoint with the
            best value, of those that were saved after an evaluation (`checkpointing.best_step`).
        metadata: the config of the run, as JSON values; saved with each checkpoint
            (`checkpointing.load_metadata`). When the run resumes, it must equal the saved one.
        allow_config_mismatch: resume even if `metadata` differs from the saved metadata.

    Raises:
        ValueError: a value is out of range.
    """

    def __init__(
        self, directory: str | Path | None, *, save_every: int = 0, keep: int | None = 3,
        keep_best: tuple[str, str] | None = None, metadata: Any = None,
        allow_config_mismatch: bool = False,
    ):
        if save_every < 0:
            raise ValueError(f"save_every is {save_every}; it must be at least 0")
        checkpointing.check_retention(keep, keep_best)
        self.directory, self.every = directory, save_every
        self.keep, self.keep_best = keep, keep_best
        self.metadata, self.allow_config_mismatch = metadata, allow_config_mismatch
        self._pending: checkpointing.PendingSave | None = None

    @property
    def is_active(self) -> bool:
        """Whether checkpoints are saved."""
        return self.directory is not None

    def lock(self) -> contextlib.AbstractContextManager:
        """Returns a context manager that locks the directory against other runs."""
        if not self.is_active or jax.process_index() > 0:
            return contextlib.nullcontext()
        return directory_lock(self.directory)

    def restore(
        self, state: TrainState, rng: jax.Array | None, stateful: Mapping[str, Stateful],
        before: int | None = None,
    ) -> tuple[TrainState, jax.Array | None]:
        """Restores the last checkpoint that is not corrupted, if there is one.

        Args:
            state: the initial state, for structure and shardings; returned if there is no
                checkpoint.
            rng: the random key of the run; returned if there is no checkpoint.
            stateful: objects by the names of their states in the checkpoint; they are restored too.
            before: restores the last checkpoint before this step, and leaves the directory
                unchanged. By default, later checkpoints, which are corrupted or incomplete, are
                renamed.

        Raises:
            ValueError: the checkpoint does not match the state, has other metadata, or is corrupted
                and `before` is given; or every checkpoint is corrupted.
        """
        if not self.is_active:
            return state, rng
        saved = [step for step in checkpoint_files.saved_steps(Path(self.directory))
                 if before is None or step < before]
        if saved:
            found = checkpointing.restore(
                self.directory, state, None if before is None else saved[-1])
            self._check_metadata(found.metadata)
            state, rng = found.state, found.rng
            for name, item in stateful.items():
                if name in (found.data_state or {}):
                    item.set_state(found.data_state[name])
        if before is None and jax.process_index() == 0:
            checkpoint_files.quarantine_incomplete(self.directory, after=int(state.step))
        return state, rng

    def _check_metadata(self, saved: Any) -> None:
        """Raises ValueError if a run would resume with another model, data set or setting."""
        if self.allow_config_mismatch or self.metadata is None or saved is None:
            return
        current = checkpoint_files.to_json(self.metadata, "metadata")
        then, now = (flatten_paths({"": x}) for x in (saved, current))
        changed = [name for name in sorted(then.keys() | now.keys())
                   if then.get(name) != now.get(name)]
        if changed:
            changes = "; ".join(f"{name.lstrip('/')} was {then.get(name)} and is {now.get(name)}"
                                for name in changed[:5])
            more = f" (and {len(changed) - 5} more)" if len(changed) > 5 else ""
            raise ValueError(f"the run in {self.directory} has another config: {changes}{more}; "
                             "use the same settings, another directory, or allow_config_mismatch")

    def save(
        self, state: TrainState, rng: jax.Array | None, stateful: Mapping[str, Stateful],
        metrics: Mapping[str, float],
    ) -> None:
        """Starts to save a checkpoint, after the previous one is complete.

        Args:
            state: its arrays are copied to the host before this method returns.
            rng: the random key of the run.
            stateful: objects by the names of their states in the checkpoint; a state that is None
                is not saved.
            metrics: the metrics of an evaluation of `state`, if there was one.

        Raises:
            SaveError: a checkpoint could not be saved.
        """
        if not self.is_active:
            return
        self.wait()
        states = {name: item.get_state() for name, item in stateful.items()}
        self._pending = checkpointing.save(
            self.directory, int(state.step), state, rng=rng, metadata=self.metadata,
            data_state={name: value for name, value in states.items() if value is not None},
            keep=self.keep, keep_best=self.keep_best, metrics=metrics, wait=False)

    def roll_back(self, like: TrainState, bad_step: int) -> TrainState:
        """Returns the state of the last checkpoint.

        Args:
            like: an abstract state, for structure and shardings.
            bad_step: the number of the anomalous step, for the error.

        Raises:
            BadStepError: no checkpoint was saved yet.
        """
        self.wait()
        if checkpointing.latest_step(self.directory) is None:
            raise BadStepError(
                f"cannot roll back from step {bad_step}, because {self.directory} contains no "
                "checkpoint yet; save more often (save_every), or skip bad steps", bad_step, None)
        return checkpointing.restore(self.directory, like).state

    def check(self) -> None:
        """Raises `SaveError` if the last save has failed, without waiting for it."""
        if self._pending is not None:
            self._pending.check()

    def wait(self) -> None:
        """Waits until the last save is complete, and raises `SaveError` if it has failed."""
        if self._pending is not None:
            self._pending.result()
