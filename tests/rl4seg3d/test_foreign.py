"""Weights of other programs, synthesised to the documented names and contracts."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from medrl.core.errors import CheckpointError, ConfigError
from medrl.plugins.rl4seg3d.foreign import convert, load_scripted, read_weights
from medrl.plugins.rl4seg3d.foreign.naming import architecture
from medrl.plugins.rl4seg3d.models import UNet3d

CPU = torch.device("cpu")


def net(seed=0, **arguments):
    torch.manual_seed(seed)
    return UNet3d(base_filters=4, **arguments).eval()


def prefixed(prefix, network):
    return {f"{prefix}{name}": weight for name, weight in network.state_dict().items()}


@pytest.fixture(scope="module")
def nets():
    return {
        "actor": net(1),
        "reference": net(2),
        "critic": net(3, out_channels=1),
        "reward_anatomical": net(4, in_channels=2, out_channels=1),
        "reward_landmark": net(5, in_channels=2, out_channels=1),
    }


@pytest.fixture
def lightning(nets, tmp_path):
    state = prefixed("actor.actor.net.", nets["actor"]) | prefixed("actor.actor.old_net.", nets["reference"])
    state |= prefixed("actor.critic.net.", nets["critic"])
    state |= prefixed("rewardnet_0.", nets["reward_anatomical"])
    state |= prefixed("rewardnet_1.", nets["reward_landmark"])
    state |= {
        "correctorAE.net.input_block.conv1.conv.weight": torch.ones(1),
        "temperature": torch.tensor(4.5989),
    }
    content = {
        "pytorch-lightning_version": "2.1.0",
        "epoch": 3,
        "state_dict": state,
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}],
    }
    torch.save(content, tmp_path / "rl4seg3d_slim.ckpt")
    return tmp_path / "rl4seg3d_slim.ckpt"


def same_answer(one, other):
    image = torch.rand(1, one.in_channels, 64, 32, 4, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        return torch.equal(one.eval()(image), other.eval()(image))


def test_a_lightning_checkpoint_gives_every_network_with_equal_outputs(lightning, nets):
    weights = read_weights(lightning)
    assert weights.kind == "lightning"
    assert sorted(weights.networks) == sorted(nets)
    assert all(same_answer(weights.networks[part], nets[part]) for part in nets)
    assert list(weights.rewards) == ["anatomical", "landmark"]
    assert weights.temperatures == {"reward_anatomical": pytest.approx(4.5989)}
    assert weights.counts()["actor"] == sum(p.numel() for p in nets["actor"].parameters())


@pytest.mark.parametrize("prefix", ["", "module.", "net.", "module.net.", "actor.net."])
def test_bare_and_distributed_state_dicts_load_to_equal_outputs(tmp_path, nets, prefix):
    torch.save(prefixed(prefix, nets["actor"]), tmp_path / "actor.ckpt")
    weights = read_weights(tmp_path / "actor.ckpt")
    assert list(weights.networks) == ["actor"]
    assert same_answer(weights.networks["actor"], nets["actor"])


def test_a_network_without_a_name_is_known_by_its_channels(tmp_path, nets):
    for part in ("critic", "reward_landmark"):
        torch.save(nets[part].state_dict(), tmp_path / f"{part}.ckpt")
    assert list(read_weights(tmp_path / "critic.ckpt").networks) == ["critic"]
    assert list(read_weights(tmp_path / "reward_landmark.ckpt").networks) == ["reward_anatomical"]
    named = read_weights(tmp_path / "reward_landmark.ckpt", reward="landmark")
    assert list(named.networks) == ["reward_landmark"]


def test_heads_of_deep_supervision_may_be_missing_and_nothing_else(tmp_path, nets):
    state = nets["actor"].state_dict()
    without = {name: value for name, value in state.items() if not name.startswith("deep_super")}
    torch.save(without, tmp_path / "a.ckpt")
    assert same_answer(read_weights(tmp_path / "a.ckpt").networks["actor"], nets["actor"])
    del without["bottleneck.conv2.norm.bias"]
    torch.save(without, tmp_path / "b.ckpt")
    with pytest.raises(CheckpointError, match=r"missing \(bottleneck\.conv2\.norm\.bias\)"):
        read_weights(tmp_path / "b.ckpt")


def test_shapes_alone_give_the_architecture_of_the_paper():
    with torch.device("meta"):
        state = UNet3d(in_channels=2, out_channels=1).state_dict()
    found = architecture(state)
    assert found["filters"] == [32, 64, 128, 256, 320, 320]
    assert found["kernels"] == [(3, 3, 1), *[(3, 3, 3)] * 5]
    assert found["strides"] == [(1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 2), (2, 2, 1), (2, 2, 1)]
    assert (found["in_channels"], found["out_channels"]) == (2, 1)


def test_a_git_lfs_pointer_is_recognised(tmp_path):
    pointer = tmp_path / "rl4seg3d_slim.ckpt"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1095848509\n")
    with pytest.raises(CheckpointError, match="Git-LFS pointer") as caught:
        read_weights(pointer)
    assert "git lfs pull" in caught.value.do
    with pytest.raises(CheckpointError, match="Git-LFS pointer"):
        load_scripted(pointer, device=CPU, trust=True)


def test_a_network_that_depends_on_the_view_is_refused(tmp_path, nets):
    state = prefixed("actor.actor.net.", nets["actor"]) | {
        "actor.actor.net.view_embed.weight": torch.ones(3, 8)
    }
    torch.save({"state_dict": state}, tmp_path / "film.ckpt")
    with pytest.raises(CheckpointError, match="FiLM"):
        read_weights(tmp_path / "film.ckpt")


def test_pickled_settings_need_trust_and_then_run_nothing(tmp_path, nets, monkeypatch):
    module = ModuleType("omegaconf_like")

    class Settings:
        def __init__(self):
            self.lr = 0.1

    Settings.__module__, Settings.__qualname__ = "omegaconf_like", "Settings"
    module.Settings = Settings
    monkeypatch.setitem(sys.modules, "omegaconf_like", module)
    content = {"state_dict": prefixed("net.", nets["actor"]), "hyper_parameters": Settings()}
    torch.save(content, tmp_path / "a.ckpt")
    monkeypatch.delitem(sys.modules, "omegaconf_like")
    with pytest.raises(CheckpointError, match="cannot be loaded as weights") as caught:
        read_weights(tmp_path / "a.ckpt")
    assert "--trust-checkpoint" in caught.value.do
    assert same_answer(read_weights(tmp_path / "a.ckpt", trust=True).networks["actor"], nets["actor"])


def test_files_without_a_network_are_named(tmp_path):
    torch.save({"state_dict": {"fc.weight": torch.ones(2)}}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"1 entries, such as fc\.weight"):
        read_weights(tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_weights(tmp_path / "none.ckpt")


# -- convert -----------------------------------------------------------------------------------------


def test_convert_keeps_the_networks_that_are_wanted_and_their_outputs(lightning, nets, tmp_path):
    target = tmp_path / "small.safetensors"
    convert(lightning, target)
    weights = read_weights(target)
    assert sorted(weights.networks) == ["actor", "reward_anatomical", "reward_landmark"]
    assert all(same_answer(weights.networks[part], nets[part]) for part in weights.networks)
    assert weights.temperatures == {"reward_anatomical": pytest.approx(4.5989)}
    assert target.stat().st_size < 0.7 * lightning.stat().st_size
    from safetensors import safe_open

    with safe_open(target, framework="pt") as file:
        meta = json.loads(file.metadata()["medrl"])
    assert meta["source"]["sha256"] == read_weights(lightning).digest
    assert meta["networks"]["actor"]["filters"] == [4, 8, 16, 32, 40, 40]


def test_convert_refuses_unknown_parts_and_existing_files(lightning, tmp_path, nets):
    with pytest.raises(ConfigError, match="actors"):
        convert(lightning, tmp_path / "a.safetensors", parts=["actors"])
    with pytest.raises(ConfigError, match=r"\.safetensors"):
        convert(lightning, tmp_path / "a.ckpt")
    convert(lightning, tmp_path / "a.safetensors", parts=["actor"])
    with pytest.raises(ConfigError, match="it exists"):
        convert(lightning, tmp_path / "a.safetensors")
    assert list(read_weights(tmp_path / "a.safetensors").networks) == ["actor"]
    torch.save(nets["critic"].state_dict(), tmp_path / "critic.ckpt")
    with pytest.raises(CheckpointError, match="has no actor"):
        convert(tmp_path / "critic.ckpt", tmp_path / "b.safetensors")


# -- TorchScript -------------------------------------------------------------------------------------


class First(nn.Module):
    """The contract of the published package, with the thinnest content."""

    def forward(self, x: Tensor, tta: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        image = x[0, 0]
        labels = (image > 0.5).to(torch.int64) * (2 if tta else 1)
        stacked = torch.stack([image, 1.0 - image])
        return labels, stacked.amin(dim=0), stacked


class Second(nn.Module):
    """The contract of later packages."""

    @torch.jit.export
    def view_names(self) -> list[str]:
        return ["a2c", "a4c"]

    @torch.jit.export
    def reward_map_names(self) -> list[str]:
        return ["Anat", "LM", "Temporal"]

    def forward(self, image: Tensor, view: str, tta: bool) -> tuple[Tensor, Tensor, Tensor]:
        labels = (image[0, 0] > 0.5).to(torch.int64) * (2 if view == "a4c" else 1)
        stacked = torch.stack([image[0, 0], image[0, 0] / 2, image[0, 0] / 4])
        return labels, stacked.amin(dim=0), stacked


class MaskOnly(nn.Module):
    def forward(self, image: Tensor, view: int, tta: bool) -> Tensor:
        return (image > 0.5).to(torch.int64) * (view + 1)


@pytest.fixture
def scripts(tmp_path):
    for name, module in (("first", First()), ("second", Second()), ("mask", MaskOnly())):
        torch.jit.script(module).save(str(tmp_path / f"{name}.pt"))
    return tmp_path


def test_the_first_contract_gives_labels_and_named_rewards(scripts):
    scripted = load_scripted(scripts / "first.pt", device=CPU, trust=True)
    assert (scripted.generation, scripted.reward_names) == (1, ("anatomical", "landmark"))
    image = torch.rand(32, 32, 6)
    labels, rewards = scripted(image, tta=False)
    assert torch.equal(labels, (image > 0.5).long())
    assert torch.equal(rewards["anatomical"], image)
    assert torch.equal(rewards["landmark"], 1 - image)
    assert torch.equal(rewards["fused"], torch.minimum(image, 1 - image))
    assert scripted(image, tta=True)[0].max() == 2
    assert scripted(image[..., :1], tta=True)[0].shape == (32, 32, 1)


def test_the_second_contract_takes_a_view_and_any_number_of_rewards(scripts):
    scripted = load_scripted(scripts / "second.pt", device=CPU, trust=True, view="A4C")
    labels, rewards = scripted(torch.full((32, 32, 4), 0.8), tta=False)
    assert labels.unique().tolist() == [2]
    assert list(rewards) == ["fused", "anatomical", "landmark", "temporal"]
    mask = load_scripted(scripts / "mask.pt", device=CPU, trust=True, view="a4c")
    labels, rewards = mask(torch.full((32, 32, 4), 0.8), tta=False)
    assert (labels.unique().tolist(), rewards) == ([3], {})


def test_a_view_must_be_known(scripts):
    with pytest.raises(ConfigError, match="--view is missing"):
        load_scripted(scripts / "second.pt", device=CPU, trust=True)
    with pytest.raises(ConfigError, match="a3c"):
        load_scripted(scripts / "second.pt", device=CPU, trust=True, view="a3c")


def test_packages_are_run_only_when_they_are_trusted(scripts):
    with pytest.raises(CheckpointError, match="holds a program") as caught:
        load_scripted(scripts / "first.pt", device=CPU)
    assert "--trust-checkpoint" in caught.value.do


def test_a_package_that_breaks_its_contract_is_refused(tmp_path):
    class Wrong(nn.Module):
        def forward(self, x: Tensor, tta: bool) -> tuple[Tensor, Tensor, Tensor]:
            return x[0, 0, :3].to(torch.int64), x[0, 0], x[0]

    torch.jit.script(Wrong()).save(str(tmp_path / "wrong.pt"))
    with pytest.raises(CheckpointError, match="does not keep to its contract"):
        load_scripted(tmp_path / "wrong.pt", device=CPU, trust=True)
    (tmp_path / "cut.pt").write_bytes((tmp_path / "wrong.pt").read_bytes()[:500])
    with pytest.raises(CheckpointError, match="cannot be loaded as TorchScript"):
        load_scripted(tmp_path / "cut.pt", device=CPU, trust=True)
