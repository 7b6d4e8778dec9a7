from sdxl_ref.config import TextEncoderConfig as TextEncoderConfig
from sdxl_ref.config import UNetConfig as UNetConfig
from sdxl_ref.config import VAEConfig as VAEConfig
from sdxl_ref.diffusion.samplers import SAMPLERS as SAMPLERS
from sdxl_ref.diffusion.schedule import NoiseSchedule as NoiseSchedule
from sdxl_ref.networks.clip_l import CLIPTextEncoder as CLIPTextEncoder
from sdxl_ref.networks.openclip_g import OpenCLIPTextEncoder as OpenCLIPTextEncoder
from sdxl_ref.networks.packing import pack as pack
from sdxl_ref.networks.packing import unpack as unpack
from sdxl_ref.networks.unet import UNet as UNet
from sdxl_ref.networks.vae import AutoencoderKL as AutoencoderKL
from sdxl_ref.pictures.images import load_image as load_image
from sdxl_ref.pipelines.diffusion import DiffusionPipeline as DiffusionPipeline
from sdxl_ref.pipelines.ensemble import EnsemblePipeline as EnsemblePipeline
from sdxl_ref.pipelines.image_to_image import ImageToImagePipeline as ImageToImagePipeline
from sdxl_ref.pipelines.text_to_image import TextToImagePipeline as TextToImagePipeline
from sdxl_ref.text.tokenizer import tokenize as tokenize

__version__: str
