"""A user's own Python files: the only import by path in nanollava.

    function_of("./my.py:photos")  # in my.py, `import pages` means the pages.py next to it

Each folder becomes a package of its own, whose name nobody else uses. So two users' files of one
name, or a user's file and one of ours, never take each other's place in sys.modules, and a user's
random.py reaches only the files next to it. Python's import system does the rest: locks for
threads, relative imports, and nothing half imported after an error.
"""

import builtins
import hashlib
import sys
from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import find_spec, spec_from_file_location
from inspect import getmembers, isfunction
from pathlib import Path
from types import ModuleType

Paths = Iterable[str] | None  # the folders of a package; None for a module outside of any
USER_PACKAGE = "nanollava_user_"  # and a hash: the package that stands for a user's folder


def import_file(path: str | Path) -> ModuleType:
    """Import a user's FILE.py, which may import the other files of its folder."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not a file. In a recipe, begin local paths with ./")
    # A link to a file stands where the link is: its neighbours are those of the link.
    file = Path(path).parent.resolve() / Path(path).name
    package = USER_PACKAGE + hashlib.sha256(str(file.parent).encode()).hexdigest()[:12]
    folder = ModuleType(package)  # empty: a package is a module with a path to look in
    folder.__path__ = [str(file.parent)]
    sys.modules.setdefault(package, folder)  # one step, so that threads agree on one package
    # A dot in a module's name would separate a package from its module; no file name has a slash.
    return import_module(f"{package}.{file.stem.replace('.', '/')}")


class UserLoader(SourceFileLoader):
    """Runs a user's file with an `import` that looks into the file's own folder first."""

    def exec_module(self, module: ModuleType) -> None:
        own_import = partial(import_neighbour, module.__name__.partition(".")[0])
        # Python takes `import` from the builtins of the module that runs the statement.
        module.__dict__["__builtins__"] = vars(builtins) | {"__import__": own_import}
        super().exec_module(module)


class UserFinder(MetaPathFinder):
    """Finds the modules below a user's folder, so that UserLoader runs all of them."""

    def find_spec(self, name: str, path: Paths, target: object = None) -> ModuleSpec | None:
        if path is None or not name.startswith(USER_PACKAGE):
            return None
        stem = name.rpartition(".")[2].replace("/", ".")
        for folder in path:
            # A file comes before a package of its name: import_file was asked for the file.
            for file in (Path(folder, f"{stem}.py"), Path(folder, stem, "__init__.py")):
                if file.is_file():
                    return spec_from_file_location(name, file, loader=UserLoader(name, str(file)))
        return None


# First in the list: Python's own finder would load a neighbour with the usual `import`.
sys.meta_path.insert(0, UserFinder())


def is_neighbour(package: str, name: str) -> bool:
    """Does `import name` in a user's file mean something in the file's folder?

    As in a script, a neighbour comes before anything installed, except for a folder without an
    __init__.py: a user's folder of data does not hide a library of its name.
    """
    spec = find_spec(f"{package}.{name}")
    if spec is None:
        return False
    return spec.loader is not None or find_spec(name) is None  # only a plain folder has no loader


def import_neighbour(
    package: str,
    name: str,
    globals: dict | None = None,
    locals: dict | None = None,
    fromlist: Iterable[str] | None = None,
    level: int = 0,
) -> ModuleType:
    """`__import__` for a user's file: `import pages` means the pages.py next to it, if any."""
    top = name.partition(".")[0]
    # A relative import needs no help, and our own name stays ours: a user may work in our checkout.
    if level > 0 or top == "nanollava" or not is_neighbour(package, top):
        return builtins.__import__(name, globals, locals, fromlist, level)
    module = builtins.__import__(f"{package}.{name}", globals, locals, fromlist)
    # Without a fromlist `__import__` returns the first part, here the package of the folder itself,
    # but `import a.b` must bind a.
    return module if fromlist else sys.modules[f"{package}.{top}"]


def function_of(path: str) -> Callable:
    """'FILE.py:function' -> the function; raises ValueError, listing the file's own functions."""
    file, _, name = path.rpartition(":")
    module = import_file(file)
    if hasattr(module, name):
        return getattr(module, name)
    own = [key for key, f in getmembers(module, isfunction) if f.__module__ == module.__name__]
    raise ValueError(f"{file} has no function {name!r}; it has {', '.join(own) or 'none'}")
