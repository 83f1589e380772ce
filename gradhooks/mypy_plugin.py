"""A plugin for mypy, which ignores what class decorators return: types the instances of `@multipose` classes.

    [tool.mypy]
    plugins = ["gradhooks.mypy_plugin"]

Pyright needs no plugin.
"""

from collections.abc import Callable

from mypy.nodes import SymbolTableNode, TypeInfo
from mypy.plugin import ClassDefContext, Plugin
from mypy.plugins.common import add_attribute_to_class
from mypy.types import Instance

DECORATOR = "gradhooks.decorator.multipose"
WRAPPER = "gradhooks.wrapper.MultiPose"
MEMBERS = ("report", "options", "combination", "accumulator", "__call__")


class MultiPosePlugin(Plugin):
    """Adds the members of `MultiPose` to decorated classes."""

    def get_class_decorator_hook_2(self, fullname: str) -> Callable[[ClassDefContext], bool] | None:
        return _add_members if fullname == DECORATOR else None


def _add_members(context: ClassDefContext) -> bool:
    symbol = context.api.lookup_fully_qualified_or_none(WRAPPER)
    if symbol is None or not isinstance(symbol.node, TypeInfo):
        return False  # not analyzed yet: mypy calls again
    info = context.cls.info
    for name in MEMBERS:
        member = symbol.node.names[name]
        # Not `member.copy()`: of a class from mypy's cache, it loses what has not been read yet.
        info.names[name] = SymbolTableNode(member.kind, member.node, plugin_generated=True)
    add_attribute_to_class(context.api, context.cls, "model", Instance(info, []))
    return True


def plugin(version: str) -> type[Plugin]:
    """Return the plugin; mypy calls this."""
    del version
    return MultiPosePlugin
