# SPDX-License-Identifier: Apache-2.0
"""Files: which layout, which configuration, which container.

To add a format: write `formats/<name>.py` with a class of `formats.base.Format`'s methods and add it to FORMATS; the
command line, `hf-autoround list formats` and the law tests read it from there.
"""

from collections.abc import Iterable

from hf_autoround.formats.auto_round import AutoRoundFormat
from hf_autoround.formats.base import Format, StoredPlan, StoredTensor
from hf_autoround.formats.fake import FakeFormat
from hf_autoround.layers.sites import WeightSite
from hf_autoround.registry import find
from hf_autoround.scheme import Scheme

FORMATS: tuple[Format, ...] = (AutoRoundFormat(), FakeFormat())


def find_formats(names: str) -> list[Format]:
    """Return the formats of a comma-separated list, each once.

    Raises UnknownName.
    """
    found = [find(FORMATS, name.strip(), kind="format") for name in names.split(",") if name.strip()]
    return list(dict.fromkeys(found))


def reasons_against(formats: Iterable[Format], site: WeightSite, scheme: Scheme) -> list[str]:
    """Return every format's reason not to store a site, as sentences."""
    reasons = [(target.name, target.refuse(site, scheme)) for target in formats]
    return [f"{name} cannot store {site.name}: {reason}" for name, reason in reasons if reason]


__all__ = ["FORMATS", "AutoRoundFormat", "Format", "StoredPlan", "StoredTensor", "find_formats", "reasons_against"]
