"""Policies are built from text, and what is wrong in the text is said."""

import math

import pytest

from scheduler.catalog import POLICIES, build, describe
from scheduler.policies.fcfs import Fcfs
from scheduler.policies.gittins import Gittins
from scheduler.policies.mlfq import Mlfq
from scheduler.policies.srpt import Srpt
from scheduler.policies.vtc import Vtc


def test_every_policy_is_built_without_options() -> None:
    orders = {name: type(build(name, {}).order) for name in POLICIES}
    assert orders == {"fcfs": Fcfs, "mlfq": Mlfq, "vtc": Fcfs, "gittins": Gittins, "srpt": Srpt}
    assert [name for name in POLICIES if build(name, {}).shares is not None] == ["vtc"]


def test_defaults_of_the_table_are_those_of_the_classes() -> None:
    for name, cls in (("mlfq", Mlfq), ("gittins", Gittins), ("srpt", Srpt)):
        mine, theirs = vars(build(name, {}).order), vars(cls())
        plain = {key: value for key, value in theirs.items() if isinstance(value, int | float | list)}
        assert {key: mine[key] for key in plain} == plain
    assert build("vtc", {}).shares == Vtc()


def test_options_are_parsed() -> None:
    order = build("mlfq", {"patience_s": "inf", "preemptions_per_s": "0"}).order
    assert (order.patience_s, order.preemptions_per_s) == (math.inf, 0)
    assert build("vtc", {"prompt_weight": "0.5", "charge": "computed"}).shares == Vtc(0.5, charge="computed")


def test_vtc_hands_on_the_options_of_the_order_within() -> None:
    policy = build("vtc", {"within": "gittins", "patience_s": "7", "output_weight": "3"})
    assert isinstance(policy.order, Gittins)
    assert policy.order.patience_s == 7.0
    assert policy.shares == Vtc(output_weight=3.0)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("lifo", {}, "unknown policy 'lifo': choose one of fcfs, mlfq, vtc, gittins, srpt"),
        ("fcfs", {"speed": "9"}, "policy 'fcfs' has no option 'speed': it takes none at all"),
        ("mlfq", {"speed": "9"}, "policy 'mlfq' has no option 'speed': it takes quantum_steps, levels"),
        ("mlfq", {"levels": "0"}, "option levels='0' of policy 'mlfq' must be a whole number, 1 or more"),
        ("mlfq", {"levels": "x"}, "option levels='x' of policy 'mlfq' must be a whole number, 1 or more"),
        ("mlfq", {"patience_s": "nan"}, "option patience_s='nan' of policy 'mlfq' must be a number, 0 or more"),
        ("gittins", {"hysteresis": "1"}, "must be a number, 1.25 or more"),
        ("vtc", {"within": "vtc"}, "option within='vtc' of policy 'vtc' must be one of fcfs, mlfq, gittins, srpt"),
        ("vtc", {"levels": "3"}, "policy 'vtc' has no option 'levels'"),
        ("vtc", {"within": "mlfq", "hysteresis": "2"}, "policy 'vtc' has no option 'hysteresis'"),
    ],
)
def test_what_is_wrong_is_said(name: str, options: dict[str, str], says: str) -> None:
    with pytest.raises(ValueError) as error:
        build(name, options)
    assert says in str(error.value)


def test_help_names_every_policy_option_default_and_unit() -> None:
    text = describe()
    for name, entry in POLICIES.items():
        assert f"{name}: {entry.text}" in text
        for option in entry.options:
            assert f"{option.name}={option.default} {option.unit}".rstrip() in text
