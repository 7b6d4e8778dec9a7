"""Kinds of adapters that are not done here, by the keys that only they have, so that an error can name them."""

import re

KINDS = {  # what a key holds -> the kind; the first that fits counts
    r"\.oft_diag$": "OFT (kohya's)",
    r"\.oft_[rRsS](\.|$)": "OFT (PEFT's)",
    r"\.boft_[rRsS](\.|$)": "BOFT (PEFT's)",
    r"\.([ab][12]|bm)\.weight$": "GLoRA",
    r"\.on_input$|\.ia3_l(\.|$)": "IA3",
    r"\.lambda_layer$|\.[pq]_layer\.weight$": "T-LoRA",
    r"\.vera_lambda_[bd](\.|$)": "VeRA",
    r"\.lora_embedding_[AB](\.|$)": "LoRA on an embedding (PEFT's)",
    r"\.lora_[AB](\.default)?\.bias$": "LoRA with biases of its own (PEFT's lora_bias)",
    r"\.lora_diag(\.|$)": "KaSA",
    r"\.lora_velora_|\.lora_arrow": "a variant of LoRA (PEFT's)",
    r"\.lokr_t1$": "LoKr with a third factor on its first side",
}
OFT_BLOCKS = re.compile(r"\.(oft_blocks|rescale)$")  # LyCORIS' and kohya's: OFT's have one axis less than BOFT's


def kind_of(key: str, axes: int) -> str | None:
    """What a tensor with so many axes is part of; None: nothing that is known."""
    if OFT_BLOCKS.search(key):
        return "BOFT (LyCORIS')" if axes == 4 else "OFT"
    for pattern, kind in KINDS.items():
        if re.search(pattern, key):
            return kind
    return None
