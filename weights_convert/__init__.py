"""Move SDXL weights between the official layout and diffusers', both ways, bit for bit; look into them; LoRA tools."""
