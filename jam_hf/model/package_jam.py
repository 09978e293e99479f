"""The one door from a JAM to what its checkpoint does not carry; `jam_hf/__init__.py` says what lies behind it.

A checkpoint has the code to load, to generate and to decode. Asked for more without jam_hf, it says what is missing.
"""

from importlib import import_module
from types import MethodType
from typing import Any


# A name to `module:attribute`, imported when it is asked for. Empty in a folder that was loaded without jam_hf.
OFFERED: dict[str, str] = {}


def from_package(name: str, what: str) -> Any:
    """What jam_hf offers under `name`; `what` is how a user asked for it, for the message.

    Raises:
        ImportError: where the model's code came out of a checkpoint's folder.
    """
    if name not in OFFERED:
        raise ImportError(
            f"{what} needs the package jam_hf: a checkpoint carries the model only, to load, generate and decode. Run "
            "`pip install jam_hf`, then `import jam_hf` and load the folder again, without trust_remote_code."
        )
    module, attribute = OFFERED[name].split(":")
    return getattr(import_module(module), attribute)


def tell(name: str, *args: Any, otherwise: Any = None) -> Any:
    """Call what jam_hf has under `name`; where it is not there, nothing is done and the answer is `otherwise`."""
    return from_package(name, name)(*args) if name in OFFERED else otherwise


class PackageFunction:
    """A function of jam_hf as an attribute of a class, under its own name: as it is, or as a method or class method.

    It is imported when somebody reads the attribute; where it cannot be, there is one that says so when it is called.
    """

    def __init__(self, method: bool = False, class_method: bool = False):
        self.method, self.class_method = method, class_method

    def __set_name__(self, owner: type, name: str) -> None:
        self.name, self.what = name, f"{owner.__name__}.{name}()"

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if self.name not in OFFERED:
            return lambda *args, **kwargs: from_package(self.name, self.what)
        function = from_package(self.name, self.what)
        bound_to = owner if self.class_method else instance if self.method else None
        return function if bound_to is None else MethodType(function, bound_to)


__all__ = ["OFFERED", "PackageFunction", "from_package", "tell"]
