"""What the guide to a method says that no table has: the idea, when to take it, what to turn.

`GUIDES` also says where a method sits, from which `draw_methods.py` draws. A method without an
entry gets a page of its facts alone.
"""

from __future__ import annotations

from dataclasses import dataclass

LINEARS = ("q", "k", "v", "o", "up", "down")


@dataclass(frozen=True)
class Guide:
    """One method.

    Attributes:
        idea: what is trained and how it acts, in a few sentences.
        take: when it is the one to take, and when another is.
        turn: the settings that matter, the first to turn first.
        beside: linears that a trained layer stands beside.
        scaled: linears whose output is multiplied by trained factors.
        rotated: linears whose input is rotated by a trained matrix.
        inside: linears after which a trained layer is put in.
        keys: whether trained keys and values go before those of the text.
        tokens: whether trained embeddings go before the text's.
        whole: parts that are trained themselves.
        mark: what is written on the trained parts.
    """

    idea: str
    take: str
    turn: str
    beside: tuple[str, ...] = ()
    scaled: tuple[str, ...] = ()
    rotated: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()
    keys: bool = False
    tokens: bool = False
    whole: tuple[str, ...] = ()
    mark: str = ""


GUIDES: dict[str, Guide] = {
    "lora": Guide(
        "Beside every linear W stand two thin matrices: the output is W x + (alpha / r) · B A x. A "
        "maps to r numbers, B back. B begins at zero, so training begins at the base. Merged, B A "
        "becomes part of W and costs nothing.",
        "The first to try on anything. It has the most forms, the most servers load it, and here it "
        "has the fastest step. Its forms are switches: `--dora`, `--rslora`, `--lora-plus-ratio`, "
        "`--init pissa|olora|eva|loftq`.",
        "`--learning-rate` first, then `--lora-r` (8 to 64; with `--rslora` from 32 on), then "
        "`--target-modules` (every linear of the blocks by default, which is what papers find best). "
        "`--lora-alpha` scales the update and so acts like the rate.",
        beside=LINEARS, mark="A B",
    ),
    "qlora": Guide(
        "LoRA on a base whose weights are kept in 4 (or 8) bits and dequantized as they are used. "
        "What is trained and saved is the same as LoRA's.",
        "When the weights do not fit beside the step otherwise: `ftlevel plan` says. It is slower "
        "than LoRA on a float base, and the base is a little worse to begin with.",
        "As for [LoRA](lora.md); `--quant 4bit|8bit`, `--quant-type nf4`, `--double-quant`. Decide "
        "[what to merge onto](../merge.md): the 4-bit weights that it was trained on, or the originals.",
        beside=LINEARS, mark="A B",
    ),
    "adalora": Guide(
        "LoRA as P Λ Q with orthogonal P and Q. During training the least important entries of Λ "
        "are cut, so that the rank goes where it is needed.",
        "When trained parameters are scarce and the run is long enough for the cutting (some "
        "hundred steps). For short runs LoRA is as good and simpler.",
        "`init_r`, `target_r`; `tinit` and `tfinal` (steps before and after the cutting) by --set method.…",
        beside=LINEARS, mark="P Λ Q",
    ),
    "ia3": Guide(
        "One trained factor for each feature of the keys, the values and the feed-forward's inside. "
        "Nothing else: the smallest adapter that merges.",
        "When an adapter has to be tiny, or there are few rows. It cannot learn what is far from "
        "the base.",
        "`--learning-rate`: it wants ten times that of LoRA or more.",
        scaled=("k", "v", "up"), mark="×",
    ),
    "vera": Guide(
        "LoRA whose A and B are random, frozen and the same in every layer; trained are two "
        "vectors a linear that scale them.",
        "When many adapters have to be kept: some ten kilobytes each. The random matrices are made "
        "anew from a seed.",
        "`method.r` (256 by default: it is not trained, so it costs little), then the rate.",
        beside=LINEARS, mark="d b",
    ),
    "oft": Guide(
        "The input of every linear is rotated by a trained orthogonal matrix of blocks, so that "
        "angles between neurons stay as they were.",
        "When the base's knowledge must stay: a rotation keeps more of it than an addition of the "
        "same effect. A step costs more than LoRA's.",
        "`oft_block_size` (32): larger blocks can turn further and train more.",
        rotated=LINEARS, mark="R",
    ),
    "boft": Guide(
        "A rotation as in OFT, made of small blocks in butterfly order.",
        "Where OFT suits and trained parameters are to be a third of its.",
        "`boft_block_size` (4).",
        rotated=LINEARS, mark="R",
    ),
    "loha": Guide(
        "The update of every linear is the element-wise product of two low-rank matrices, which has "
        "rank r² for twice the parameters.",
        "When an update of high rank is wanted from few parameters. Costs more time than LoRA.",
        "`method.r`, `method.alpha`, then the rate.",
        beside=LINEARS, mark="AB∘AB",
    ),
    "lokr": Guide(
        "The update of every linear is a Kronecker product of a small and a low-rank matrix.",
        "When adapters must be small but reach every linear: a tenth of LoRA's parameters.",
        "`method.decompose_factor` (-1: as square as can be), `method.r`.",
        beside=LINEARS, mark="C⊗AB",
    ),
    "miss": Guide(
        "The inputs of every linear are summed in shards to r numbers, and one trained matrix maps "
        "these to the outputs. There is no second matrix to hold or to multiply by.",
        "Where LoRA suits, and half of its trained matrices are to be spared at the same rank. It "
        "goes to servers as plain LoRA.",
        "`method.r` (64), at most the inputs of a linear; then the rate, which is near its edge: "
        "of eight classes MiniLM had 0.89 at 3e-4 and 0.24 at 1e-3.",
        beside=LINEARS, mark="D",
    ),
    "shira": Guide(
        "A few weights of every linear, drawn at random by a seed, are trained themselves; as many as "
        "LoRA of rank r would have.",
        "When several adapters are to be merged into one base: few of their weights meet. Merging is "
        "exact. No server loads it but merged.",
        "`method.r` (32) sets how many weights, `random_seed` which.",
        beside=LINEARS, mark="S",
    ),
    "hira": Guide(
        "Every weight is multiplied, entry by entry, by 1 + B A: a low-rank factor, whose update has "
        "the rank of the weight.",
        "When an update of high rank is wanted at LoRA's number of parameters. A step holds a whole "
        "weight more for each linear, and no server loads it but merged.",
        "`--learning-rate` first: it wants ten times that of LoRA. Then `method.r` (32).",
        beside=LINEARS, mark="W∘BA",
    ),
    "gralora": Guide(
        "Every weight is cut into k by k blocks, and each gets a LoRA of rank r / k of its own.",
        "Where LoRA of a high rank does no better than of a low one: a block that goes astray does not "
        "take the others with it. It goes to servers as plain LoRA of rank k r.",
        "`method.gralora_k` (2) must divide the rank and both sides of every linear; `method.r` (32).",
        beside=LINEARS, mark="k² A B",
    ),
    "c3a": Guide(
        "The update of every linear is made of circulant blocks, each of one trained row, and is "
        "computed by Fourier transforms.",
        "When an update of high rank is wanted from few parameters. Merging builds a whole matrix, and no "
        "server loads it but merged.",
        "`block_size` (64) must divide both sides of every linear: smaller blocks have more parameters. Its "
        "rate is 0.3, three hundred times LoRA's.",
        beside=LINEARS, mark="⟳",
    ),
    "adapter": Guide(
        "A small network (down to a few features, a non-linearity, up again) inside every block: "
        "after attention and after the feed-forward (`houlsby`), after the feed-forward alone "
        "(`seq_bn`, `pfeiffer`), or beside it (`parallel`, `par_bn`, `adapter_plus`).",
        "Where several tasks share one base and adapters are swapped, or AdapterHub's are to be used. "
        "It does not merge, so it costs time in use. [What each placement computes](../methods.md#adapter).",
        "`--set method.placement=parallel` learned best here among the six; `reduction_factor` sets the width.",
        inside=("o", "down"), mark="adapter",
    ),
    "prefix": Guide(
        "In every attention, trained keys and values stand before those of the text. The text's own "
        "computation is untouched.",
        "For language models and encoders with few rows, and where one batch answers for several "
        "tasks. It takes from the context's length in attention, and does not merge.",
        "`--set method.num_virtual_tokens=20`, then the rate, which is fifty times LoRA's.",
        keys=True, mark="P",
    ),
    "prompt": Guide(
        "Trained embeddings stand before the text's. The smallest of all: 20 of them by default.",
        "With large models (its paper finds it level with full fine-tuning from some billion "
        "parameters on). Small ones learn slowly by it.",
        "`--set method.num_virtual_tokens=20`; `prompt_tuning_init` begins them as words of the vocabulary or of a text.",
        tokens=True, mark="P",
    ),
    "p-tuning": Guide(
        "Trained embeddings before the text's, which a small network makes; only its output is saved.",
        "As prompt tuning, where that is unsteady. It was the weakest here on a small encoder.",
        "`encoder_reparameterization_type` (MLP or LSTM), `num_virtual_tokens`.",
        tokens=True, mark="P",
    ),
    "ln-tuning": Guide(
        "The weights (and biases) of the norms are trained, and nothing else.",
        "As a baseline that costs nothing, and beside a new head. It merges, and it is the "
        "least memory of those that reach every layer.",
        "The rate alone.",
        whole=("norm 1", "norm 2"), mark="",
    ),
    "full": Guide(
        "Every weight is trained. With `--set method.freeze_base=true` only a new head is: the "
        "linear probe, which says what the base knows already.",
        "For small models, or with memory to spare: gradients and two optimizer states for every "
        "weight. The result is a model, not an adapter.",
        "`--learning-rate`: a tenth of LoRA's or less.",
        whole=("embedding", "norm 1", *LINEARS, "norm 2", "head"), mark="",
    ),
}  # fmt: skip
