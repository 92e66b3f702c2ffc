"""Texts of the guide to each method: idea, use, main settings.

`GUIDES` also has the positions that `draw_methods.py` draws. A method without an entry gets a page
with its facts only.
"""

from __future__ import annotations

from dataclasses import dataclass

LINEARS = ("q", "k", "v", "o", "up", "down")


@dataclass(frozen=True)
class Guide:
    """Guide to one method.

    Attributes:
        idea: what is trained and how it acts, in a few sentences.
        use: when to use it, and when not.
        settings: settings that matter, the most important first.
        added: linear layers with an additive update.
        scaled: linear layers whose output is scaled.
        rotated: linear layers whose input is rotated.
        inside: linear layers followed by a trained layer.
        keys: whether trained keys and values are prepended.
        tokens: whether trained embeddings are prepended.
        trained: parts that are trained directly.
        mark: label of the trained parts.
    """

    idea: str
    use: str
    settings: str
    added: tuple[str, ...] = ()
    scaled: tuple[str, ...] = ()
    rotated: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()
    keys: bool = False
    tokens: bool = False
    trained: tuple[str, ...] = ()
    mark: str = ""


GUIDES: dict[str, Guide] = {
    "lora": Guide(
        "Two low-rank matrices are added to every linear layer W: the output is W x + (alpha / "
        "r) · B A x. B is zero at first, so training starts from the base. After merging, B A "
        "is part of W and costs nothing.",
        "As the first choice for any task. LoRA has the most variants and server support, and the "
        "fastest step here. Variants are switches: `--dora`, `--rslora`, `--lora-plus-ratio`, "
        "`--init pissa|olora|eva|loftq`.",
        "`--learning-rate` first, then `--lora-r` (8 to 64; with `--rslora` 32 or more), then "
        "`--target-modules` (all linear layers of the blocks by default). `--lora-alpha` scales"
        " the update, so a higher value acts like a higher learning rate.",
        added=LINEARS, mark="A B",
    ),
    "qlora": Guide(
        "LoRA on a base whose weights are stored in 4 (or 8) bits and dequantized when used. "
        "The adapter is the same as LoRA's.",
        "When the base does not fit into memory in 16 bits; `ftlevel plan` shows this. It is "
        "slower than LoRA on a float base, and quantization costs some quality.",
        "As for [LoRA](lora.md); `--quant 4bit|8bit`, `--quant-type nf4`, `--double-quant`. "
        "Decide [which base to merge into](../merge.md#quantized-runs): the quantized or the "
        "original weights.",
        added=LINEARS, mark="A B",
    ),
    "adalora": Guide(
        "The update of a linear layer is P Λ Q with orthogonal P and Q and diagonal Λ. The least "
        "important entries of Λ are pruned during training, so ranks differ between layers.",
        "When trained parameters are limited and the run has some hundred steps. For short "
        "runs, LoRA is as good and simpler.",
        "`init_r`, `target_r`; `tinit` and `tfinal` (steps before and after pruning), all by "
        "`--set method.NAME=…`.",
        added=LINEARS, mark="P Λ Q",
    ),
    "ia3": Guide(
        "One trained scaling factor for each feature of keys, values and the inner feed-forward"
        " layer. It is the smallest adapter that can be merged.",
        "When the adapter must be tiny, or there are few rows. It cannot learn tasks far from "
        "what the base can do.",
        "`--learning-rate`: at least ten times LoRA's.",
        scaled=("k", "v", "up"), mark="×",
    ),
    "vera": Guide(
        "LoRA with random, frozen A and B that all layers share. Only two vectors per linear "
        "layer are trained; they scale the outputs of A and B.",
        "When many adapters must be stored: each takes about ten kilobytes. The random matrices"
        " are regenerated from a seed.",
        "`method.r` (256 by default; a large rank costs little, because A and B are not "
        "trained), then the learning rate.",
        added=LINEARS, mark="d b",
    ),
    "oft": Guide(
        "The input of every linear layer is rotated by a trained block-diagonal orthogonal "
        "matrix, which preserves angles between neurons.",
        "When the base's knowledge must be preserved. A step costs more than LoRA's.",
        "`oft_block_size` (32): larger blocks have more parameters.",
        rotated=LINEARS, mark="R",
    ),
    "boft": Guide(
        "A rotation of the input as in OFT, composed of small blocks in butterfly order.",
        "In the same cases as OFT, with a third of its parameters.",
        "`boft_block_size` (4).",
        rotated=LINEARS, mark="R",
    ),
    "loha": Guide(
        "The update of every linear layer is the element-wise product of two low-rank matrices,"
        " which has rank r² with twice the parameters of LoRA.",
        "When a high-rank update is needed with few parameters. It takes more time than LoRA.",
        "`method.r`, `method.alpha`, then the learning rate.",
        added=LINEARS, mark="AB∘AB",
    ),
    "lokr": Guide(
        "The update of every linear layer is a Kronecker product of a small and a low-rank matrix.",
        "When adapters must be small but cover every linear layer. It has a tenth of LoRA's "
        "parameters.",
        "`method.decompose_factor` (-1: as square as possible), `method.r`.",
        added=LINEARS, mark="C⊗AB",
    ),
    "miss": Guide(
        "The input features of every linear layer are summed in r groups. One trained matrix "
        "maps the r sums to the outputs.",
        "In the same cases as LoRA, with half of its parameters at the same rank. `export` "
        "writes it as plain LoRA.",
        "`method.r` (64), at most the input width of a layer; then the learning rate, whose "
        "default is close to the limit: MiniLM reached an accuracy of 0.89 on eight classes at "
        "3e-4 and 0.24 at 1e-3.",
        added=LINEARS, mark="D",
    ),
    "shira": Guide(
        "A few weights of every linear layer, selected at random, are trained directly: as "
        "many as LoRA has parameters at rank r.",
        "When several adapters will be merged into one base, because few of their weights "
        "overlap. Merging is exact. Servers load it only merged.",
        "`method.r` (32) sets the number of weights, `random_seed` the selection.",
        added=LINEARS, mark="S",
    ),
    "hira": Guide(
        "Every weight is multiplied element-wise by 1 + B A, so the update has the rank of the "
        "weight.",
        "When a high-rank update is needed with LoRA's number of parameters. A step needs "
        "memory for one more weight per layer, and servers load it only merged.",
        "`--learning-rate` first: ten times LoRA's. Then `method.r` (32).",
        added=LINEARS, mark="W∘BA",
    ),
    "gralora": Guide(
        "Every weight is divided into k by k blocks, each with its own LoRA of rank r / k.",
        "When a higher LoRA rank does not help. `export` writes it as plain LoRA of rank k · r.",
        "`method.gralora_k` (2) must divide the rank and both sides of every linear layer; "
        "`method.r` (32).",
        added=LINEARS, mark="k² A B",
    ),
    "c3a": Guide(
        "The update of every linear layer consists of circulant blocks with one trained row "
        "each, computed by Fourier transforms.",
        "When a high-rank update is needed with few parameters. Servers load it only merged.",
        "`block_size` (64) must divide both sides of every linear layer; smaller blocks have "
        "more parameters. The learning rate is 0.3, three hundred times LoRA's.",
        added=LINEARS, mark="⟳",
    ),
    "adapter": Guide(
        "A small network (down-projection, nonlinearity, up-projection) is added to each block: "
        "after attention and feed-forward (`houlsby`), after the feed-forward only (`seq_bn`, "
        "`pfeiffer`), or parallel to it (`parallel`, `par_bn`, `adapter_plus`).",
        "When you switch between adapters on one base, or for compatibility with"
        " AdapterHub. It cannot be merged, so it adds inference time. See [what each placement "
        "computes](../methods.md#adapter).",
        "`--set method.placement=parallel` was the best of six in our tests; `reduction_factor` "
        "sets the width.",
        inside=("o", "down"), mark="adapter",
    ),
    "prefix": Guide(
        "Trained keys and values are prepended in every attention layer. The rest of the model "
        "is unchanged.",
        "For language models and encoders with few rows, and when one batch serves several "
        "tasks. It cannot be merged and uses part of the context length.",
        "`--set method.num_virtual_tokens=20`, then the learning rate, which is fifty times "
        "LoRA's.",
        keys=True, mark="P",
    ),
    "prompt": Guide(
        "Trained embeddings (20 by default) are prepended to the input. This method has the "
        "fewest parameters of all.",
        "With large models: in its paper it equals full fine-tuning from some billion "
        "parameters on. Small models learn slowly.",
        "`--set method.num_virtual_tokens=20`; `prompt_tuning_init` initializes the embeddings "
        "from the vocabulary or a text.",
        tokens=True, mark="P",
    ),
    "p-tuning": Guide(
        "Trained embeddings are prepended to the input. During training, a small network "
        "produces them; only its output is saved.",
        "When prompt tuning is unstable. It was the weakest method in our tests on a small "
        "encoder.",
        "`encoder_reparameterization_type` (MLP or LSTM), `num_virtual_tokens`.",
        tokens=True, mark="P",
    ),
    "ln-tuning": Guide(
        "Only the weights and biases of the norms are trained.",
        "As a cheap baseline, and together with a new head. It can be merged and needs the "
        "least memory of the methods that change every layer.",
        "The learning rate.",
        trained=("norm 1", "norm 2"), mark="",
    ),
    "full": Guide(
        "All weights are trained. With `--set method.freeze_base=true`, only a new head is "
        "trained (linear probe).",
        "For small models, or with enough memory for gradients and two optimizer states per "
        "weight. The result is a model, not an adapter.",
        "`--learning-rate`: a tenth of LoRA's or less.",
        trained=("embedding", "norm 1", *LINEARS, "norm 2", "head"), mark="",
    ),
}  # fmt: skip
