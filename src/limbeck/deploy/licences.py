"""What licences of models say about teaching another model. No legal advice: every row names the text to read.

A row tells four things: whether outputs or weights may make another model, what the student's own licence must carry on,
what has to be shown or handed over with it, and where that is written. Where a text leaves room, the row says "check".
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

Rule = Literal["allowed", "conditions", "limited", "forbidden", "check"]
NOT_ADVICE = "This is no legal advice; read the licence."


@dataclass(frozen=True)
class Licence:
    """One licence, or the terms of one service.

    key: the hub's identifier, or the name the hub's cards give it as `license_name`. rule: may it teach another model:
    allowed; conditions (allowed, and the student owes what `binds`, `begins`, `shows` and `notice` say); limited (for
    some purposes only); forbidden; check (the text leaves it open, or is not known here). binds: what the student's
    licence must carry on. begins: how the student's name must begin. shows: a sentence to be displayed. notice: a text
    for a NOTICE file. wants_copy: a copy of the text goes with the model. own_kind_free: the ban does not cover models
    derived from the same family. on_hub: the hub lists the key itself.
    """

    key: str
    title: str
    rule: Rule
    about: str
    source: str
    binds: frozenset[str] = field(default_factory=frozenset)
    begins: str | None = None
    shows: str | None = None
    notice: str | None = None
    wants_copy: bool = False
    own_kind_free: bool = False
    on_hub: bool = True
    link: str | None = None


NOTICES, SHARE_ALIKE, NON_COMMERCIAL = "keeping notices", "sharing alike", "no commercial use"
_CC = "deed and legal code of Creative Commons; whether a distilled model is adapted material is not settled"


def find_licence(name: str) -> Licence | None:
    """The row of an identifier or a name as people write it; None when it is not known here."""
    key = re.sub(r"[\s_]+", "-", name.strip().lower())
    key = _ALIASES.get(key, key)
    return LICENCES.get(key)


def unlisted_licence(name: str, link: str | None = None) -> Licence:
    """A row for a licence that is not in the table: everything about it has to be checked."""
    about = "is not known to Limbeck: check whether its outputs or weights may be used to make another model"
    return Licence(
        name, name, "check", about, "the teacher's card", frozenset({f'the terms of "{name}"'}), on_hub=False, link=link
    )


def find_service(address: str) -> Licence | None:
    """The terms of a vendor's service, by the address it is asked at; None for a server of one's own."""
    host = (urlsplit(address if "//" in address else f"//{address}").hostname or "").rstrip(".")
    if not host or host == "localhost" or "." not in host or re.fullmatch(r"[\d.]+", host) or ":" in host:
        return None
    for ending, row in SERVICES.items():
        if host == ending or host.endswith("." + ending):
            return row
    return unlisted_licence(f"terms of the service at {host}")


def missing_duties(taught_by: Licence, chosen: Licence) -> list[str]:
    """What the teacher's licence passes on and the chosen one does not carry: empty when it is not more permissive."""
    return [] if taught_by.key == chosen.key else sorted(taught_by.binds - chosen.binds)


def _permissive(key: str, title: str, source: str, link: str | None = None) -> Licence:
    about = "says nothing against it; notices of copyright and licence stay with what is derived"
    return Licence(key, title, "allowed", about, source, frozenset({NOTICES}), link=link)


def _free(key: str, title: str) -> Licence:
    return Licence(key, title, "allowed", "asks for nothing", f"text of {title}")


def _copyleft(key: str, title: str) -> Licence:
    about = "was made for programs: check whether a model made from the weights must stand under it"
    return Licence(
        key,
        title,
        "check",
        about,
        f"text of the {title}",
        frozenset({NOTICES, f"the copyleft of {key}"}),
        wants_copy=True,
    )


def _commons(parts: str, version: str) -> Licence:
    binds = {NOTICES}
    rule: Rule = "conditions" if parts == "by-sa" else "allowed"
    about = "allows it when the makers are named"
    if "nc" in parts:
        rule, about = "limited", "allows it for purposes that are not commercial; the makers are named"
        binds.add(NON_COMMERCIAL)
    if "sa" in parts:
        about += "; what is derived is shared under the same licence"
        binds.add(SHARE_ALIKE)
    if "nd" in parts:
        rule, about = "check", "does not let adapted material be shared: check whether the student is any"
        binds.add("no derivatives")
    key = f"cc-{parts}-{version}"
    return Licence(key, f"CC {parts.upper()} {version}", rule, about, _CC, frozenset(binds))


def _rail(key: str, title: str) -> Licence:
    about = (
        "counts a model made by distillation or from its outputs to perform alike as a derivative: its restrictions of "
        "use are passed on to whoever gets the student"
    )
    return Licence(
        key, title, "conditions", about, f"{title}: definitions, sections 4 and 5, attachment A (check the variant)",
        frozenset({NOTICES, "the OpenRAIL restrictions of use"}), wants_copy=True,
    )  # fmt: skip


def _llama(version: str, released: str) -> Licence:
    about = (
        "allows it: a model made with its weights or outputs and handed on has a name that begins with Llama, shows "
        '"Built with Llama" and comes with the agreement; services with more than 700 million users a month need a licence of their own'
    )
    return Licence(
        f"llama{version}", f"Llama {version} Community License", "conditions", about,
        f"Llama {version} Community License Agreement ({released}), sections 1.b and 2",
        frozenset({NOTICES, f"the terms of Llama {version}"}), begins="Llama", shows="Built with Llama",
        notice=f"Llama {version} is licensed under the Llama {version} Community License, "
        "Copyright © Meta Platforms, Inc. All Rights Reserved.",
        wants_copy=True,
    )  # fmt: skip


def _banned(key: str, title: str, kin: str, source: str, **more: object) -> Licence:
    about = f"forbids to use it or its outputs to improve any other large language model, except {kin} and what derives from it"
    binds = frozenset({NOTICES, f"the terms of {kin}"})
    return Licence(key, title, "forbidden", about, source, binds, wants_copy=True, own_kind_free=True, **more)  # type: ignore[arg-type]


_ROWS = [
    _permissive("apache-2.0", "Apache License 2.0", "Apache License 2.0, section 4", "https://www.apache.org/licenses/LICENSE-2.0"),
    _permissive("mit", "MIT License", "text of the MIT License"),
    *(_permissive(key, f"{key.upper()} License", f"text of {key}") for key in ("bsd", "bsd-2-clause", "bsd-3-clause", "isc", "ncsa")),
    _free("cc0-1.0", "CC0 1.0"),
    _free("unlicense", "The Unlicense"),
    *(_commons(parts, version) for parts in ("by", "by-sa", "by-nc", "by-nc-sa", "by-nd", "by-nc-nd") for version in ("3.0", "4.0")),
    *(_copyleft(key, key.upper()) for key in ("gpl", "gpl-2.0", "gpl-3.0", "agpl-3.0", "lgpl-2.1", "lgpl-3.0", "mpl-2.0", "eupl-1.2")),
    _rail("openrail", "OpenRAIL family"),
    _rail("openrail++", "Open RAIL++-M"),
    _rail("bigscience-openrail-m", "BigScience OpenRAIL-M"),
    _rail("bigscience-bloom-rail-1.0", "BigScience BLOOM RAIL 1.0"),
    _rail("bigcode-openrail-m", "BigCode OpenRAIL-M v1"),
    _rail("creativeml-openrail-m", "CreativeML OpenRAIL-M"),
    _banned(
        "llama2", "Llama 2 Community License", "Llama 2", "Llama 2 Community License Agreement (18 July 2023), section 1.b.v",
        notice="Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All Rights Reserved.",
    ),
    _banned(
        "llama3", "Meta Llama 3 Community License", "Meta Llama 3",
        "Meta Llama 3 Community License Agreement (18 April 2024), sections 1.b.i and 1.b.v",
        begins="Llama 3", shows="Built with Meta Llama 3",
        notice="Meta Llama 3 is licensed under the Meta Llama 3 Community License, Copyright © Meta Platforms, Inc. All Rights Reserved.",
    ),
    _llama("3.1", "23 July 2024"),
    _llama("3.2", "25 September 2024"),
    _llama("3.3", "6 December 2024"),
    _llama("4", "5 April 2025"),
    Licence(
        "gemma", "Gemma Terms of Use", "conditions",
        "counts a model made by distillation or from its outputs to perform alike as a derivative of Gemma: the student stands "
        "under the same terms and restrictions of use, and whoever gets it is told so (Gemma 4 is Apache-2.0)",
        "Gemma Terms of Use, sections 1.1(e), 3.1 and 3.2", frozenset({NOTICES, "the Gemma terms"}),
        notice="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
        wants_copy=True, link="https://ai.google.dev/gemma/terms",
    ),
    Licence(
        "qwen", "Qwen License Agreement", "conditions",
        'allows it: a model made with its weights or outputs and handed on shows "Built with Qwen" or "Improved using Qwen"; '
        "services with more than 100 million users a month need a licence of their own",
        "Qwen License Agreement (19 September 2024), rules of use; check the version of your model",
        frozenset({NOTICES, "the terms of Qwen"}), shows="Built with Qwen", wants_copy=True, on_hub=False,
    ),
    Licence(
        "qwen-research", "Qwen Research License Agreement", "limited",
        'allows use that is not commercial only; a model made with its weights or outputs and handed on shows "Built with Qwen" '
        'or "Improved using Qwen"',
        "Qwen Research License Agreement, sections 2 and 4; check the version of your model",
        frozenset({NOTICES, NON_COMMERCIAL, "the terms of Qwen"}), shows="Built with Qwen", wants_copy=True, on_hub=False,
    ),
    _banned("tongyi-qianwen", "Tongyi Qianwen License Agreement", "Tongyi Qianwen",
            "Tongyi Qianwen License Agreement (3 August 2023), section 5.b", on_hub=False),
    Licence(
        "mrl", "Mistral AI Research License", "limited",
        "allows models, derivatives and outputs to be used for research that is not commercial; anything else needs a licence from Mistral AI",
        "MRL-0.1, preamble and usage limitation; check what it asks of those who hand derivatives on",
        frozenset({NOTICES, NON_COMMERCIAL, "the terms of the Mistral AI Research License"}), wants_copy=True, on_hub=False,
        link="https://mistral.ai/licenses/MRL-0.1.md",
    ),
    Licence(
        "mnpl", "Mistral AI Non-Production License", "limited",
        "allows models and derivatives to be used for testing, research, personal use and evaluation outside production, and not to be "
        "supplied in the course of a commercial activity",
        "MNPL-0.1, section 3.2; check what it says of outputs",
        frozenset({NOTICES, NON_COMMERCIAL, "the terms of the Mistral AI Non-Production License"}), wants_copy=True, on_hub=False,
        link="https://mistral.ai/licenses/MNPL-0.1.md",
    ),
    Licence(
        "deepseek", "DeepSeek License Agreement", "conditions",
        "counts a model made by distillation or from its outputs to perform alike as a derivative: its restrictions of use are passed on, "
        "and a copy of the agreement is handed over (several DeepSeek models are MIT: check yours)",
        "DeepSeek License Agreement 1.0 (23 October 2023), sections 1, 4 and 5",
        frozenset({NOTICES, "the DeepSeek restrictions of use"}), wants_copy=True, on_hub=False,
    ),
]  # fmt: skip

LICENCES: dict[str, Licence] = {row.key: row for row in _ROWS}

_ALIASES = {
    "apache": "apache-2.0", "apache2": "apache-2.0", "apache-2": "apache-2.0", "apache2.0": "apache-2.0",
    "apache-license-2.0": "apache-2.0", "mit-license": "mit", "bsd-3": "bsd-3-clause", "cc0": "cc0-1.0",
    "llama-2": "llama2", "llama-3": "llama3", "llama-3.1": "llama3.1", "llama-3.2": "llama3.2", "llama-3.3": "llama3.3",
    "llama-4": "llama4", "gemma-terms-of-use": "gemma", "qianwen": "tongyi-qianwen",
    "tongyi-qianwen-license": "tongyi-qianwen", "qwen-license": "qwen", "qwen-license-agreement": "qwen",
    "qwen-research-license": "qwen-research", "tongyi-qianwen-research": "qwen-research",
    "mistral-research": "mrl", "mistral-research-license": "mrl", "mistral-ai-research-license": "mrl", "mrl-0.1": "mrl",
    "mistral-ai-non-production-license": "mnpl", "mnpl-0.1": "mnpl",
    "deepseek-license": "deepseek", "deepseek-model-license": "deepseek", "deepseek-license-agreement": "deepseek",
}  # fmt: skip


def _service(name: str, source: str) -> Licence:
    about = f"forbids to use what {name} answers (or the service) to develop models that compete with {name}"
    return Licence(f"terms of {name}", f"terms of {name}", "limited", about, source, on_hub=False)


def _open_question(name: str) -> Licence:
    about = "have to be checked: may its answers be used to make another model?"
    return Licence(f"terms of {name}", f"terms of {name}", "check", about, f"terms of service of {name}", on_hub=False)


_GOOGLE = _service("Google", "Gemini API Additional Terms of Service, use restrictions")
SERVICES: dict[str, Licence] = {
    "openai.com": _service("OpenAI", "OpenAI Terms of Use (what you cannot do) and Services Agreement (restrictions)"),
    "anthropic.com": _service("Anthropic", "Anthropic Commercial Terms of Service, use restrictions"),
    "googleapis.com": _GOOGLE,
    "google.dev": _GOOGLE,
    "azure.com": _open_question("Microsoft Azure"),
    "mistral.ai": _open_question("Mistral AI"),
    "cohere.com": _open_question("Cohere"),
    "cohere.ai": _open_question("Cohere"),
    "deepseek.com": _open_question("DeepSeek"),
    "openrouter.ai": _open_question("OpenRouter and of the vendor behind it"),
}
