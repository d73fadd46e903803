"""A process of its own, as far as pieces of one's own go: what one test adds, the next does not see."""

import sys
from contextlib import contextmanager
from pathlib import Path

from limbeck import plugins

TABLES = (
    plugins.COMPARISONS, plugins.LOGIT_OBJECTIVES, plugins.OBJECTIVES, plugins.FILTERS, plugins.SEGMENTERS, plugins.MIXERS,
    plugins._FILES, plugins._NAMED, plugins._ORIGINS,
)  # fmt: skip


def _own_modules():
    names = {Path(file).stem for file in plugins._FILES}
    return {name: sys.modules[name] for name in names & set(sys.modules)}


def _take():
    return [dict(table) for table in TABLES], {family: set(names) for family, names in plugins.ADDED.items()}


def _put(tables, added):
    for table, kept in zip(TABLES, tables, strict=True):
        table.clear()
        table.update(kept)
    for family, names in added.items():
        plugins.ADDED[family].clear()
        plugins.ADDED[family].update(names)


SHIPPED = _take()


@contextmanager
def fresh_process():
    """Within, only what ships is there; afterwards what was there before, and nothing that was added within."""
    before, modules = _take(), _own_modules()
    for name in modules:
        del sys.modules[name]
    _put(*SHIPPED)
    try:
        yield
    finally:
        for name in _own_modules():
            del sys.modules[name]
        _put(*before)
        sys.modules.update(modules)
