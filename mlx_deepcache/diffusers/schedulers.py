"""diffusers' schedulers: a class's name and its config, which is all that a plan of steps is made of here."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

from ..checkpoints.folder import read_json
from ..checkpoints.hub import find_file
from ..diffusion.schedulers import SCHEDULERS, defaults_of, schedule
from ..errors import CheckpointError, UsageError
from ..fields import suggest
from .parts import weights

_OPEN = "_use_default_values"  # in diffusers' configs: what one was not told, where another class has its own default
# What a class of diffusers takes that has no effect but beside what is refused
_WITHOUT_EFFECT = {"dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "variance_type"}
_KNOWN = {key for name in SCHEDULERS for key in defaults_of(name)} | _WITHOUT_EFFECT


class Config(dict):
    """A config whose values are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the scheduler's config has no {name!r}") from None


class Scheduler:
    """A scheduler by its class's name in diffusers and what its config was told."""

    row: ClassVar[str | None] = None  # of `SCHEDULERS`

    def __init__(self, **told: Any):
        """told: as diffusers' class.

        Raises:
            TypeError: there is no such setting.
            NotImplementedError: a value is not supported; names it.
        """
        known = {**dict.fromkeys(_WITHOUT_EFFECT), **defaults_of(self.row)}
        for name in told:
            if name not in known:
                raise TypeError(f"{type(self).__name__} has no setting {name!r}{suggest(name, known)}")
        self.told, self.hidden, self.corrections = told, {}, {}
        self.check()

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | Scheduler, **changed: Any) -> Scheduler:
        """config: of any scheduler, of which another class's own settings are kept for a later one; changed: settings
        that differ."""
        config = dict(config.config if isinstance(config, Scheduler) else config)
        open_, known = config.pop(_OPEN, ()), defaults_of(cls.row)
        config = {name: value for name, value in config.items() if name not in open_ and name[0] != "_"}
        for name in [name for name in changed if name not in known and name in _KNOWN]:
            warnings.warn(f"{cls.__name__} has no setting {name}, which is ignored as in diffusers", stacklevel=2)
            del changed[name]
        made = cls(**{name: value for name, value in config.items() if name in known} | changed)
        made.hidden = {name: value for name, value in config.items() if name not in known}
        return made

    @classmethod
    def from_pretrained(cls, model: str | os.PathLike, subfolder: str | None = None, **changed: Any) -> Scheduler:
        """From the config in a model's folder or repository."""
        file = weights(model, "scheduler_config.json", subfolder)
        return cls.from_config(read_json(find_file(file)), **changed)

    @property
    def config(self) -> Config:
        """The whole config, as diffusers has it."""
        defaults = defaults_of(self.row)
        left = [name for name in defaults if name not in self.told]
        return Config({**self.hidden, **defaults, **self.stored, _OPEN: left})

    @property
    def stored(self) -> dict[str, Any]:
        """What a scheduler_config.json would say."""
        return {**self.told, **self.corrections, "_class_name": type(self).__name__}

    def check(self) -> None:
        """Raises NotImplementedError for a config that cannot be honoured."""
        try:
            schedule(self.stored)
        except (CheckpointError, UsageError) as error:
            raise NotImplementedError(f"{type(self).__name__}: {error}") from None

    def corrected(self, corrections: Mapping[str, Any]) -> Scheduler:
        """With a family's corrections of its models' configs, as diffusers' pipelines make them of what they are
        given; a setting that was not told stays one that another class has its own default for."""
        made = type(self).from_config(self.config)
        made.corrections = {name: value for name, value in corrections.items() if name in defaults_of(self.row)}
        return made


class DDIMScheduler(Scheduler):
    row = "ddim"


class PNDMScheduler(Scheduler):
    row = "pndm"


class EulerDiscreteScheduler(Scheduler):
    row = "euler"


class EulerAncestralDiscreteScheduler(Scheduler):
    row = "euler-a"


class HeunDiscreteScheduler(Scheduler):
    row = "heun"


class DPMSolverMultistepScheduler(Scheduler):
    row = "dpm++2m"


class UniPCMultistepScheduler(Scheduler):
    row = "unipc"


class LCMScheduler(Scheduler):
    row = "lcm"


class DDPMScheduler(Scheduler):
    row = "ddpm"


class OwnScheduler(Scheduler):
    """A model's own, of a class that is not drawn with here: another one can be made from its config."""

    def __init__(self, config: dict[str, Any]):
        self.stored_config = config

    @property
    def config(self) -> Config:
        return Config(self.stored_config)

    @property
    def stored(self) -> dict[str, Any]:
        return self.stored_config

    def corrected(self, corrections: Mapping[str, Any]) -> Scheduler:
        return self


_CLASSES = {cls.__name__: cls for cls in Scheduler.__subclasses__() if cls.row is not None}


def own(config: dict[str, Any]) -> Scheduler:
    """A model's own scheduler; one that cannot be honoured says so when it is drawn with."""
    cls = _CLASSES.get(config.get("_class_name"))
    try:
        return OwnScheduler(config) if cls is None else cls.from_config(config)
    except NotImplementedError:
        return OwnScheduler(config)


def taken(scheduler: Any) -> Scheduler:
    """A scheduler that a script gives: one of these, or diffusers' own object, by its class's name and config.

    Raises:
        NotImplementedError: of a class that is not drawn with here.
    """
    if isinstance(scheduler, Scheduler):
        return scheduler
    name = type(scheduler).__name__
    if name not in _CLASSES or not isinstance(getattr(scheduler, "config", None), Mapping):
        raise NotImplementedError(f"{name} is no scheduler that is drawn with here, only {', '.join(_CLASSES)}")
    return _CLASSES[name].from_config(scheduler.config)
