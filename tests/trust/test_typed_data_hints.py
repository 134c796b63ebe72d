"""What is proposed about images, weights and reductions is typed as it stands: the mistake does not come back."""

import pytest
from hint_places import stopping_at_work
from situations_data import DATA, FORCED, LATE, lay

from mim.cli import main
from mim.conv_encoder import ConvEncoder
from mim.encoder import Encoder
from mim.errors import UserError
from mim.interop import ModelCard
from mim.memory import load_memory
from mim.run.weights import export_backbone

pytestmark = [pytest.mark.middle, pytest.mark.usefixtures("quick_probes")]


@pytest.fixture(scope="session")
def kinds(weights, tmp_path_factory):
    """Exported encoders by the word that stands for them."""
    folder = tmp_path_factory.mktemp("kinds of weights")
    grey = Encoder("test_vit", img_size=32, patch_size=8, in_chans=1)
    bare = Encoder("test_vit", img_size=32, patch_size=8, kwargs={"class_token": False, "global_pool": "avg"})
    export_backbone(grey.vit, folder / "grey", mean=[0.5], std=[0.25], card=ModelCard(method="MAE", data="grey"))
    export_backbone(
        bare.vit,
        folder / "bare",
        mean=[0.5] * 3,
        std=[0.25] * 3,
        card=ModelCard(method="MAE", data="shapes"),
        model_args={"class_token": False},
    )
    conv = ConvEncoder("test_resnet", img_size=32)
    export_backbone(
        conv.vit, folder / "conv", mean=[0.5] * 3, std=[0.25] * 3, card=ModelCard("SparK", "shapes"), img_size=(32, 32)
    )
    return {"WEIGHTS": weights} | {name.upper(): str(folder / name) for name in ("grey", "bare", "conv")}


@pytest.fixture
def refused(tmp_path, monkeypatch, kinds):
    """Makes a mistake in a working folder that holds all kinds of images."""
    monkeypatch.chdir(tmp_path)
    lay(kinds["WEIGHTS"])

    def make(call):
        command, *args = [kinds.get(word, word) for word in call]
        assert main(command, args) == 2

    return make


@pytest.mark.parametrize("call", DATA.values(), ids=DATA)
def test_a_refused_data_set_is_not_refused_again(call, refused, typist):
    with stopping_at_work():
        refused(call)
    typist.type_all()


@pytest.mark.parametrize("call", LATE.values(), ids=LATE)
def test_what_is_refused_at_work_is_not_refused_again(call, refused, typist):
    refused(call)
    typist.type_all()


@pytest.mark.parametrize(("name", "value", "call"), FORCED.values(), ids=FORCED)
def test_what_a_machine_refuses_is_not_refused_again(name, value, call, refused, typist, monkeypatch):
    monkeypatch.setattr(name, value)
    refused(call)
    typist.type_all()


def test_memory_that_is_not_there_can_be_learnt(kinds, typist, tmp_path):
    with pytest.raises(UserError, match="holds no memory") as refused:
        load_memory(kinds["BARE"])
    typist.heard.append(("finetune", ["--weights", kinds["BARE"]], tmp_path, refused.value))
    typist.type_all()
