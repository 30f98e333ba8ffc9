"""One small model per design in timm."""

from __future__ import annotations

from torch import nn

from benchmarks.zoo.inputs import MakeInputs, images
from benchmarks.zoo.prepare import finish

# One small variant per file of timm.models, and more where a file holds several designs.
TIMM = """
beit_base_patch16_224 botnet26t_256 halonet26t lambda_resnet26t repvgg_a0 mobileone_s0 gernet_s
regnetz_b16 resnet32ts cait_xxs24_224 coat_lite_tiny convit_tiny convmixer_768_32 convnext_atto
convnextv2_atto cpubone_nano crossvit_9_240 csatv2 cs3darknet_focus_s cspresnet50 cspnext_tiny
davit_tiny deit_tiny_distilled_patch16_224 densenet121 dla46_c dpn48b edgenext_xx_small
efficientformer_l1 efficientformerv2_s0 efficientnet_b0 efficientnet_lite0 efficientvim_m1
efficientvit_b0 efficientvit_m0 eva02_tiny_patch14_224 fasternet_t0 fastvit_t8 fbnetc_100
focalnet_tiny_srf gcvit_xxtiny ghostnet_050 ghostnetv2_100 ghostnetv3_050 gmlp_ti16_224
hardcorenas_a hgnetv2_b0 hiera_tiny_224 hieradet_small hrnet_w18_small iformer_t
inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small levit_128s
levit_conv_128s lowformer_b0 mambaout_femto coatnet_pico_rw_224 maxvit_pico_rw_256 poolformer_s12
caformer_s18 mixer_s32_224 resmlp_12_224 mixnet_s mnasnet_small mobilenetv2_050
mobilenetv3_small_050 mobilenetv4_conv_small_035 mobilenetv5_base mobilevit_xxs mobilevitv2_050
mvitv2_tiny naflexvit_base_patch16_gap nasnetalarge nest_tiny nextvit_small nf_regnet_b0 nf_resnet26
pit_ti_224 pnasnet5large pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002 regnety_002
repghostnet_050 repvit_m0_9 res2net50_14w_8s resnest14d resnet10t resnet18d resnetblur18
ecaresnet26t seresnext26d_32x4d resnetv2_18 resnetv2_50x1_bit rexnet_100 selecsls42
legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18 spnasnet_100 starnet_s050 swiftformer_xs
swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 tinynet_e tiny_vit_5m_224
tnt_s_patch16_224 tresnet_m twins_svt_small vgg11_bn visformer_tiny vit_tiny_patch16_224
vit_tiny_r_s16_p8_224 vit_relpos_small_patch16_224 samvit_base_patch16_224 vitamin_small_224
volo_d1_224 ese_vovnet19b_slim legacy_xception xception41 xcit_nano_12_p16_224
"""


def names() -> list[str]:
    return TIMM.split()


def build(name: str, size: int | None) -> tuple[nn.Module, MakeInputs]:
    import timm

    model = timm.create_model(name, pretrained=False)
    config = model.pretrained_cfg
    shape = config["input_size"]
    if size is not None:
        if config.get("fixed_input_size"):
            model = timm.create_model(name, pretrained=False, img_size=size)
        shape = (3, size, size)
    return finish(model, images(*shape))
