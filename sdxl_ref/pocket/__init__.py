"""The pocket pair: a small base and refiner of SDXL's architecture, trained by this package's own recipe."""
