from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from secrets import token_hex

import pytest

from tests.containers.engine import Engine, compose_program, docker_engine
from tests.containers.images import base_images
from tests.containers.site import Site

BUILD_S = 2400.0  # three gigabytes of packages, on a busy machine
MARKS = [pytest.mark.slow, pytest.mark.containers, pytest.mark.timeout(2 * BUILD_S)]

NewSite = Callable[[str], Site]


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A Docker Engine with our images, built from this tree."""
    folder = tmp_path_factory.mktemp("docker")
    with docker_engine(folder) as found:
        with base_images(found, folder) as override:
            built = replace(found, overrides=(override,) if override else ())
            builder = Site(built, compose_program(), "evenhand-build", folder, list(built.overrides))
            builder.compose("build", "gateway", "worker", limit_s=BUILD_S)
        yield built


@pytest.fixture(scope="session")
def compose() -> str:
    return compose_program()


@pytest.fixture(scope="module")
def new_site(engine: Engine, compose: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NewSite]:
    """Makes projects, none of which leaves anything behind."""
    with ExitStack() as after:

        def make(name: str) -> Site:
            site = Site(engine, compose, f"evenhand-{name}-{token_hex(3)}", tmp_path_factory.mktemp(name))
            after.callback(site.compose, "--profile", "*", "down", "--volumes", "--timeout", "1")
            return site

        yield make
