"""Front door of the toy method."""

from medrl.core import PluginInfo, hookimpl


@hookimpl
def medrl_plugin_info():
    return PluginInfo(
        name="toy",
        api=1,
        summary="count steps",
        license="Apache-2.0",
        config="medrl_toy.config:ToyConfig",
        networks="medrl_toy.model:networks",
    )


@hookimpl
def medrl_register_models(registry):
    registry.add("line", "medrl_toy.model:Line", summary="one weight")
    registry.add("curve", "medrl_toy.model:Line", summary="two weights")


@hookimpl
def medrl_register_commands(commands):
    commands.train("medrl_toy.commands:train")
    commands.predict("medrl_toy.commands:predict")
    commands.demo("medrl_toy.commands:demo")
    commands.tool("medrl_toy.commands:shout")
