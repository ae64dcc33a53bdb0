"""A user's own Python file, imported by path: the only import by path in nanollava.

    function_of("./my.py:photos")  # `import pages` in my.py means the pages.py beside it

Each folder becomes a package of its own, so that two users' files of one name, or a user's file and
one of ours, never take each other's place.
"""

import builtins
import hashlib
import sys
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import FileFinder, ModuleSpec, SourceFileLoader
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

USER_PACKAGE = "nanollava_user_"  # and a hash: the package that stands for a user's folder


def import_file(path: str | Path) -> ModuleType:
    """Import a user's FILE.py, which may import the other files of its folder.

    Each folder is a package of its own, so that two users' files of one name, or a user's and ours,
    never take each other's place. Raises FileNotFoundError where there is no such file.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{path} is not a file. In a recipe, begin local paths with ./")
    file = file.resolve()
    name = f"{package_of(file.parent)}.{file.stem}"
    if name not in sys.modules:
        spec = spec_from_file_location(name, file, loader=UserLoader(name, str(file)))
        module = sys.modules[name] = module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]  # the next call must not find half a module
            raise
    return sys.modules[name]


def package_of(folder: Path) -> str:
    """The name of the package that stands for a folder; it is made at the first call."""
    name = USER_PACKAGE + hashlib.sha256(str(folder).encode()).hexdigest()[:12]
    if name not in sys.modules:
        package = ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    return name


class UserLoader(SourceFileLoader):
    """Runs a user's file with an `import` that looks into the file's own folder first."""

    def exec_module(self, module: ModuleType) -> None:
        own_import = partial(import_neighbour, module.__name__.partition(".")[0])
        module.__dict__["__builtins__"] = vars(builtins) | {"__import__": own_import}
        super().exec_module(module)


class UserFinder(MetaPathFinder):
    """Finds the modules below a user's folder, so that UserLoader runs them too."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if not name.startswith(USER_PACKAGE) or path is None:
            return None
        found = (FileFinder(place, (UserLoader, [".py"])).find_spec(name) for place in path)
        return next((spec for spec in found if spec is not None), None)


sys.meta_path.append(UserFinder())


def import_neighbour(
    package: str, name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level=0
) -> ModuleType:
    """`__import__` for a user's file: `import pages` means the pages.py beside it, if there is one.

    As in a Python script, a neighbour comes before any installed package. Only this package's own
    name stays ours.
    """
    top = name.partition(".")[0]
    if level or top == "nanollava" or find_spec(f"{package}.{top}") is None:
        return builtins.__import__(name, globals, locals, fromlist, level)
    module = builtins.__import__(f"{package}.{name}", globals, locals, fromlist or (), 0)
    # Without a fromlist, `import a.b` binds a; `__import__` has returned the folder's package.
    return module if fromlist else sys.modules[f"{package}.{top}"]


def function_of(path: str) -> Any:
    """'FILE.py:function' -> the function; raises ValueError, listing the file's own functions."""
    file, _, name = path.rpartition(":")
    module = import_file(file)
    if not hasattr(module, name):
        own = [
            key
            for key, value in vars(module).items()
            if callable(value)
            and not key.startswith("_")
            and getattr(value, "__module__", "") == module.__name__
        ]
        raise ValueError(f"{file} has no function {name!r}. It has {', '.join(own) or 'none'}")
    return getattr(module, name)
