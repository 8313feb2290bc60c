"""Which part of a checkpoint each process of an Algorithm takes, and whether the whole fits it.

Pure: looks at `about` of a checkpoint and at what there is now. Owns: the mapping of policies, what a learner or runner
takes that the checkpoint has no counterpart of, and the patterns by which each rank chooses its bytes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rl_ckpt.errors import InvalidInputError
from rl_ckpt.rllib.team import Role
from rl_ckpt.state.paths import join, literal

LOCAL_RUNNER = Role("env_runner", 0)


@dataclass(frozen=True, slots=True)
class Plan:
    """What of a checkpoint goes where."""

    policies: Mapping[str, str]
    """Id in the checkpoint → id here."""
    whole: bool
    """Whether the Algorithm goes on from the checkpoint; else it takes only policies out of it."""
    episodes: bool = True
    """Whether running episodes may go on: their agents act by the same policies as before."""
    learners: int = 1
    """How many learners have a part of their own in the checkpoint."""
    runners: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """By part (`env_runners`, `eval_env_runners`): indices that the checkpoint has."""

    def learner(self, role: Role) -> int:
        """The part that a learner takes: its own, or the first one's."""
        return role.index if role.index < self.learners else 0

    def source(self, role: Role) -> tuple[str, int] | None:
        """The part that a runner takes: its own, or, for its connectors alone, a neighbour's; None: there is none."""
        part = f"{role.kind}s"
        for name in (part, "env_runners"):
            have = self.runners.get(name, ())
            if have:
                return name, role.index if name == part and role.index in have else min(have)
        return None

    def own(self, role: Role) -> bool:
        """Whether the checkpoint has this runner's own part."""
        return role.index in self.runners.get(f"{role.kind}s", ())


def select_for(plan: Plan, parts: Iterable[Role]) -> list[str]:
    """Patterns of what a process reads.

    Args:
        plan: What goes where.
        parts: What the process consists of.
    """
    out, parts = ["about"], list(parts)
    for part in parts:
        if part.kind == "driver":
            out += ["algorithm", "replay_buffer"] if plan.whole else []
            source = plan.source(LOCAL_RUNNER)
            if plan.whole and LOCAL_RUNNER not in parts and source is not None:  # it may hold its runners' connectors
                out += [f"{source[0]}/{source[1]}/connectors"]
        elif part.kind == "learner":
            out += [literal(join("policies", saved)) for saved in plan.policies]
            out += ["learner", f"learners/{plan.learner(part)}"] if plan.whole else []
        else:
            out += [literal(join(join("policies", saved), "module")) for saved in plan.policies]
            out += ["learner"] if plan.whole else []
            source = plan.source(part)
            out += [f"{source[0]}/{source[1]}"] if plan.whole and source is not None else []
    return list(dict.fromkeys(out))


def plan_of(
    about: Mapping[str, Any],
    have: Sequence[str],
    wanted: Mapping[str, str] | Sequence[str] | None,
    goes_on: bool,
) -> Plan:
    """What goes where.

    Args:
        about: Of the checkpoint.
        have: Ids of the policies of the Algorithm.
        wanted: Ids in the checkpoint, or ids in the checkpoint → ids here; None: all.
        goes_on: Whether the Algorithm takes the rest of the state too, beside the policies.

    Raises:
        InvalidInputError: It is not an Algorithm's checkpoint, or some ids are not known; says which are.
    """
    if about["kind"] != "algorithm":
        text = f"the checkpoint is of one {about['kind']}, not of an Algorithm"
        raise InvalidInputError(f"{text}; `rl_ckpt.rllib.load_policy` reads it")
    saved = list(about["policies"])
    mapping = _mapping(wanted, saved, have)
    homeless = [id_ for id_ in mapping.values() if id_ not in have]
    problems = _unknown(mapping, saved)
    if homeless:
        problems.append(f"this Algorithm has no policies {_known(homeless, have)}")
    twice = sorted({id_ for id_ in mapping.values() if list(mapping.values()).count(id_) > 1})
    if twice:
        problems.append(f"policies {twice} of this Algorithm would be restored from several ones")
    if wanted is None:
        lacking = [id_ for id_ in have if id_ not in saved]
        if lacking:
            text = "say which ones you want: `policies={'id in the checkpoint': 'id here'}`"
            problems.append(f"policies {lacking} of this Algorithm are not in the checkpoint; {text}")
    if problems:
        raise InvalidInputError("; ".join(problems))
    return Plan(
        mapping,
        goes_on,
        wanted is None,
        about["num_learners"],
        {part: tuple(about[part]) for part in ("env_runners", "eval_env_runners")},
    )


def check_policies(wanted: Iterable[str], saved: Sequence[str]) -> None:
    """Whether a checkpoint has policies.

    Raises:
        InvalidInputError: Not all; lists those that it has.
    """
    if isinstance(wanted, str):
        raise InvalidInputError(f"policies={wanted!r} must be a list of ids; the checkpoint has {list(saved)}")
    problems = _unknown(wanted, saved)
    if problems:
        raise InvalidInputError(problems[0])


def _unknown(wanted: Iterable[str], saved: Sequence[str]) -> list[str]:
    unknown = [id_ for id_ in wanted if id_ not in saved]
    return [f"the checkpoint has no policies {_known(unknown, saved)}"] if unknown else []


def _mapping(
    wanted: Mapping[str, str] | Sequence[str] | None, saved: Sequence[str], have: Sequence[str]
) -> dict[str, str]:
    if wanted is None:
        return {id_: id_ for id_ in saved}
    if isinstance(wanted, str) or not wanted:
        raise InvalidInputError(f"policies={wanted!r} must be a list of ids, or a dict {{'in the checkpoint': 'here'}}")
    return dict(wanted) if isinstance(wanted, Mapping) else {id_: id_ for id_ in wanted}


def _known(unknown: Sequence[str], known: Sequence[str]) -> str:
    close = sorted({match for id_ in unknown for match in difflib.get_close_matches(str(id_), known, 3)})
    hint = f"did you mean {close}? " if close else ""
    return f"{list(unknown)}; {hint}it has {list(known)}"
