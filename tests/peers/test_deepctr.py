"""Whole networks with the same weights in DeepCTR-Torch 0.3.0 give the same logits. Run by `make peers-test`, which fetches it.

DeepCTR-Torch imports three classes of Keras for callbacks; empty ones stand in for them, as nothing here is trained.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
import torch
from small import click, scrambled
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from features.schema import parse_schema
from features.vocabulary import Vocabularies, Vocabulary
from training.networks import NETWORKS, build
from training.networks.contract import Fields, Network, Part
from training.networks.embeddings import Embeddings
from training.networks.interactions import PairwiseProducts
from training.networks.layers import BatchNorm, Dice
from training.networks.recurrent import AUGRU

pytestmark = pytest.mark.filterwarnings("ignore")
if find_spec("deepctr_torch") is None:  # asked before anything stands in for Keras: other tests in this process would take it for real
    pytest.skip("could not import 'deepctr_torch': make peers-test", allow_module_level=True)
keras = ModuleType("tensorflow.python.keras.callbacks")
keras.__dict__.update({name: type(name, (), {}) for name in ("CallbackList", "EarlyStopping", "ModelCheckpoint", "History")})
for name in ("tensorflow", "tensorflow.python", "tensorflow.python.keras", keras.__name__):
    sys.modules.setdefault(name, keras if name == keras.__name__ else ModuleType(name))
models, inputs, layers = (import_module(f"deepctr_torch.{name}") for name in ("models", "inputs", "layers"))

WIDTH, ROWS, PAST = 4, 6, 3
HIDDEN = (8, 5)
FIELDS = ("user_id", "age", "ad_id", "genre")
VALUES = [f"v{i}" for i in range(7)]
HISTORY = f'history = {{ length = {PAST}, fields = ["ad_id", "genre"] }}\n'
SCHEMA = "".join(f'[{part}.{name}]\nkind = "category"\n' for part, name in zip(("user", "user", "ad", "ad"), FIELDS, strict=True))
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def ours(family: str, history: bool = False, **settings: Any) -> Network:
    """A network of ours with random weights."""
    vocabularies = Vocabularies({name: Vocabulary(VALUES) for name in FIELDS}, {})
    known = NETWORKS[family].settings
    widths = {"embedding": WIDTH, "hidden": HIDDEN, "dropout": 0.0, **settings}
    taken = {name: value for name, value in widths.items() if hasattr(known(), name)}
    text = 'name = "peers"\n' + (HISTORY if history else "") + SCHEMA
    torch.manual_seed(0)
    built = scrambled(build(family, Fields.of(parse_schema(text), vocabularies), known(**taken)))
    assert isinstance(built, Network)
    return built


def request() -> tuple[Tensor, Tensor]:
    """Ids `(R, 4)` in the order of `FIELDS`, and behaviours `(R, T, 2)`, the first of them without any."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, len(VALUES) + 2, (ROWS, len(FIELDS)), generator=generator)
    past = torch.randint(1, len(VALUES) + 2, (ROWS, PAST, 2), generator=generator)
    lengths = torch.arange(ROWS) % (PAST + 1)
    past[torch.arange(PAST) >= lengths[:, None]] = 0
    return ids, past


def logits(network: Network, ids: Tensor, past: Tensor) -> Tensor:
    """Ours `(R,)`."""
    none = torch.zeros
    parts = Part(ids[:, :2], none(ROWS, 0)), Part(past, none(ROWS, PAST, 0)), Part(ids[:, None, 2:], none(ROWS, 1, 0))
    return click(network, *parts).squeeze(1)


def columns(history: bool = False) -> list[Any]:
    """The same fields as theirs."""
    size = len(VALUES) + 2
    found = [inputs.SparseFeat(name, size, embedding_dim=WIDTH) for name in FIELDS]
    if history:
        for name in FIELDS[2:]:
            behaviour = inputs.SparseFeat(f"hist_{name}", size, embedding_dim=WIDTH, embedding_name=name)
            found.append(inputs.VarLenSparseFeat(behaviour, maxlen=PAST, length_name="seq_length"))
    return found


def rows_of(ids: Tensor, past: Tensor | None = None) -> Tensor:
    """What theirs reads: all columns of a row side by side."""
    if past is None:
        return ids.float()
    lengths = (past[..., 0] > 0).sum(1)[:, None]
    return torch.cat([ids, past[..., 0], lengths, past[..., 1]], 1).float()


def copy_vectors(embed: Embeddings, theirs: nn.ModuleDict) -> None:
    for name, table in theirs.items():
        assert isinstance(table, nn.Embedding)
        table.weight[0] = 0
        table.weight[1:] = embed.table.weight[embed.rows_of(name)]


def copy_mlp(first: nn.Linear, rest: nn.Module, theirs: Any, order: Tensor | None = None) -> list[nn.Linear]:
    """An MLP with its norms, but for its last layer; `order` are the columns of our input as they have them. Our linear layers."""
    linears = [first, *(module for module in rest.modules() if isinstance(module, nn.Linear))]
    for mine, peer in zip(linears, theirs.linears, strict=False):
        peer.weight.copy_(mine.weight if mine is not first or order is None else mine.weight[:, order])
        peer.bias.copy_(mine.bias)
    norms = [module for module in rest.modules() if isinstance(module, BatchNorm) and module.affine]
    for mine, peer in zip(norms, getattr(theirs, "bn", ()), strict=False):
        peer.load_state_dict(mine.state_dict())
    for i, dice in enumerate(module for module in rest.modules() if isinstance(module, Dice)):
        peer = theirs.activation_layers[i]
        peer.alpha.copy_(dice.alpha.view_as(peer.alpha))
        peer.bn.running_mean.copy_(dice.norm.running_mean)
        peer.bn.running_var.copy_(dice.norm.running_var)
    return linears


def copy_tower(tower: Any, theirs: Any, order: Tensor | None = None) -> None:
    """A tower, as their `dnn`, `dnn_linear` and `out`."""
    last = copy_mlp(tower.first, tower.rest, theirs.dnn, order)[-1]
    theirs.dnn_linear.weight.copy_(last.weight)
    theirs.out.bias.copy_(last.bias)


def made(kind: str, *given: Any, **settings: Any) -> Any:
    """One of their networks whose output is a logit."""
    return getattr(models, kind)(*given, task="regression", **settings).eval()


@torch.no_grad()
def test_fm() -> None:
    network, theirs = ours("fm"), made("DeepFM", columns(), columns(), dnn_hidden_units=())
    copy_vectors(network.first, theirs.linear_model.embedding_dict)
    copy_vectors(network.second, theirs.embedding_dict)
    theirs.out.bias.copy_(network.bias)
    ids, past = request()
    assert torch.allclose(logits(network, ids, past), theirs(rows_of(ids)).squeeze(1), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("norm", ["none", "batch"])
def test_deepfm(norm: str) -> None:
    network = ours("deepfm", norm=norm)
    theirs = made("DeepFM", columns(), columns(), dnn_hidden_units=HIDDEN, dnn_use_bn=norm == "batch")
    copy_vectors(network.first, theirs.linear_model.embedding_dict)
    copy_vectors(network.second, theirs.embedding_dict)
    copy_tower(network.tower, theirs)
    theirs.out.bias.add_(network.bias)
    ids, past = request()
    assert torch.allclose(logits(network, ids, past), theirs(rows_of(ids)).squeeze(1), **CLOSE)


@torch.no_grad()
def test_wide_deep() -> None:
    """Without crosses, which they leave to the data."""
    network, theirs = ours("wide_deep"), made("WDL", columns(), columns(), dnn_hidden_units=HIDDEN, dnn_use_bn=True)
    copy_vectors(network.first, theirs.linear_model.embedding_dict)
    copy_vectors(network.second, theirs.embedding_dict)
    copy_tower(network.tower, theirs)
    ids, past = request()
    assert torch.allclose(logits(network, ids, past), theirs(rows_of(ids)).squeeze(1), **CLOSE)


@torch.no_grad()
def test_ipnn() -> None:
    """Ours has each half's products behind its vectors, those of the candidate with the request first; they have no batch norm."""
    network, theirs = ours("ipnn"), made("PNN", columns(), dnn_hidden_units=HIDDEN)
    copy_vectors(network.embed, theirs.embedding_dict)
    still(network.tower.rest)
    w = 2 * WIDTH
    user, ad = list(range(w)), list(range(w + 1, 2 * w + 1))
    pairs = [w, 2 * w + 1, 2 * w + 3, 2 * w + 2, 2 * w + 4, 2 * w + 5]  # 01 02 03 12 13 23, of ours 01 | 20 21 30 31 23
    copy_tower(network.tower, theirs, torch.tensor(user + ad + pairs))
    ids, past = request()
    assert torch.allclose(logits(network, ids, past), theirs(rows_of(ids)).squeeze(1), **CLOSE)


def still(rest: nn.Module) -> None:
    """Let batch norm do nothing."""
    for norm in (module for module in rest.modules() if isinstance(module, BatchNorm)):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.zero_()
        norm.running_var.fill_(1 - norm.eps)
        if norm.affine:
            norm.weight.fill_(1)
            norm.bias.zero_()


@torch.no_grad()
def test_dcn() -> None:
    """They add a linear part, which is left at 0, and have no bias behind the crosses but that of the output."""
    network = ours("dcn", crosses=2)
    theirs = made("DCN", columns(), columns(), cross_num=2, dnn_hidden_units=HIDDEN, dnn_use_bn=True)
    for table in theirs.linear_model.embedding_dict.values():
        table.weight.zero_()
    copy_vectors(network.embed, theirs.embedding_dict)
    copy_mlp(network.deep.first, network.deep.rest, theirs.dnn)
    theirs.crossnet.kernels.copy_(torch.stack(list(network.cross.weights))[..., None])
    theirs.crossnet.bias.copy_(torch.stack(list(network.cross.biases))[..., None])
    theirs.dnn_linear.weight.copy_(network.last.weight)
    theirs.out.bias.copy_(network.last.bias)
    ids, past = request()
    assert torch.allclose(logits(network, ids, past), theirs(rows_of(ids)).squeeze(1), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("softmax", [False, True])
def test_din(softmax: bool) -> None:
    """Ours normalises the input of the MLP, as the authors' program does; here it does not. Who has no history is no case of theirs under
    softmax: they spread it evenly over the padding."""
    network = ours("din", history=True, attention=(6, 3), softmax=softmax)
    theirs = made(
        "DIN", columns(history=True), ["ad_id", "genre"], dnn_hidden_units=HIDDEN, att_hidden_size=(6, 3), att_weight_normalization=softmax
    )
    theirs.dnn.activation_layers = nn.ModuleList(layers.activation.Dice(width, dim=2) for width in HIDDEN).eval()
    copy_vectors(network.embed, theirs.embedding_dict)
    unit = theirs.attention.local_att
    unit.dense.load_state_dict(copy_mlp(network.attention.first, network.attention.rest, unit.dnn)[-1].state_dict())
    still(network.tower.norms)
    user, interest, ad = torch.arange(6 * WIDTH).chunk(3)
    copy_tower(network.tower, theirs, torch.cat([user, ad, interest]))
    ids, past = request()
    compared = slice(None) if not softmax else past[:, 0, 0] > 0
    theirs_found = theirs(rows_of(ids, past)).squeeze(1)
    assert torch.allclose(logits(network, ids, past)[compared], theirs_found[compared], **CLOSE)


@torch.no_grad()
def test_the_recurrences_of_dien() -> None:
    """Their AUGRU registers one bias under both names; here it has the two that were meant. Their attention is an MLP, ours the paper's."""
    network, past = ours("dien", history=True), request()[1]
    extractor, evolving = models.dien.InterestExtractor(2 * WIDTH), layers.sequence.DynamicGRU(2 * WIDTH, 2 * WIDTH, gru_type="AUGRU")
    extractor.gru.load_state_dict(nn.GRU.state_dict(network.extract))
    augru = network.evolve
    assert isinstance(augru, AUGRU)
    cell = evolving.rnn
    assert cell.bias_ih is cell.bias_hh, "their fault is mended: undo nothing"
    del cell._parameters["bias_ih"], cell._parameters["bias_hh"]
    cell.weight_ih.copy_(augru.input.weight)
    cell.weight_hh.copy_(augru.state.weight)
    cell.bias_ih, cell.bias_hh = augru.input.bias, augru.state.bias
    vectors = network.embed("history", Part(past, torch.zeros(ROWS, PAST, 0))).flatten(2)
    mask = past[..., 0] > 0
    some, lengths = mask.any(1), mask.sum(1)
    states, _ = extractor(vectors, lengths)
    mine = network.extract(vectors)
    assert torch.allclose(mine[some] * mask[some][..., None], states, **CLOSE)
    attention = network.attention(mine, torch.randn(ROWS, 1, 2 * WIDTH), mask)
    packed = [pack_padded_sequence(x[some], lengths[some], batch_first=True, enforce_sorted=False) for x in (mine, attention[:, 0])]
    found, _ = pad_packed_sequence(evolving(*packed), batch_first=True)
    last = found[torch.arange(len(found)), lengths[some] - 1]
    assert torch.allclose(augru(mine, attention)[some, 0], last, **CLOSE)


@torch.no_grad()
def test_the_products_of_dlrm_and_ipnn() -> None:
    """Each pair of fields once; ours has the request's own first."""
    vectors = torch.randn(ROWS, 5, WIDTH)
    within, across = PairwiseProducts(2, 3)(vectors[:, :2], vectors[:, None, 2:])
    theirs = layers.interaction.InnerProductLayer()(list(vectors.split(1, dim=1))).squeeze(2)
    both = torch.cat([within, across[:, 0]], 1)
    assert torch.allclose(both.sort(1).values, theirs.sort(1).values, **CLOSE)
