"""The forms of adapter files that are read and written, one in each file of this folder.

A form is added as a file with a `Form` named `FORM` in it; nothing else has to know of it.
"""

import pkgutil
from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType

from sdxl_ref.adapters.form import Form


def _in_this_folder() -> Mapping[str, Form]:
    """Every form by its name; the one place where modules are imported by what is there."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    forms: list[Form] = [import_module(f"{__name__}.{name}").FORM for name in names]
    return MappingProxyType({form.name: form for form in forms})


FORMS = _in_this_folder()
