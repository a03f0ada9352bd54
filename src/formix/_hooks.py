"""Registers formix's models in timm and transformers without importing either.

`import formix` needs PyTorch alone; yet `timm.create_model("formix_vit")` and `AutoModel.from_pretrained` have to know
formix after it, whichever is imported first. So a finder on `sys.meta_path` waits for the two modules that hold the
registries, lets their own loader run and adds formix's entries then: entries that load formix's models only when one
of them is asked for, because at that moment timm and transformers are still being imported themselves.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


def _register_in_timm(module: ModuleType) -> None:
    importlib.import_module("formix.models.timm_registry")


class _OnDemand(dict):
    """transformers' additional configs, in which formix's are registered when one of them is looked for."""

    def __contains__(self, key: object) -> bool:
        if isinstance(key, str) and key.startswith("formix_") and not super().__contains__(key):
            for family in ("formix.models.text", "formix.models.cvt"):
                importlib.import_module(family)
        return super().__contains__(key)


def _register_in_transformers(module: Any) -> None:
    module.CONFIG_MAPPING._extra_content = _OnDemand(module.CONFIG_MAPPING._extra_content)


REGISTRIES: dict[str, Callable[[ModuleType], None]] = {
    "timm.models": _register_in_timm,
    "transformers.models.auto.configuration_auto": _register_in_transformers,
}


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds the modules of REGISTRIES as everyone else does, and registers when their loader has run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in REGISTRIES:
            return None
        position = sys.meta_path.index(self)
        for finder in sys.meta_path[position + 1 :]:
            spec = finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                self._register_after(spec.loader, REGISTRIES[name])
                return spec
        return None

    @staticmethod
    def _register_after(loader: importlib.abc.Loader, register: Callable[[ModuleType], None]) -> None:
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            register(module)

        loader.exec_module = exec_module  # type: ignore[method-assign]


def install() -> None:
    """Register in what is imported already; wait for the rest."""
    if any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        return
    for name, register in REGISTRIES.items():
        if name in sys.modules:
            register(sys.modules[name])
    sys.meta_path.insert(0, _AfterImport())
