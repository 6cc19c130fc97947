"""Settings of the official implementations, each with the file that it was read from, under the keys of our recipes.

`settings` are compared with what a recipe and the defaults behind it come to. `code` is what no key sets: what the
official code does, and what ours does instead. A recipe's header lists every difference (`test_recipe_headers.py`).
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Official:
    """One method.

    Args:
        repository: Where the files are, at which commit.
        settings: File -> key of a recipe, dotted -> value.
        code: File -> name of a deviation -> (what the official code does, what ours does).
    """

    repository: str
    settings: dict[str, dict[str, Any]]
    code: dict[str, dict[str, tuple[str, str]]] = field(default_factory=dict)


CROP_RATIO = {"views.crop_ratio": [3 / 4, 4 / 3]}  # torchvision's default, and SimCLR's
ADAMW = {"optim": "adamw", "adam_beta1": 0.9}
BYOL_COLORS = {
    "views.jitter": [0.4, 0.4, 0.2, 0.1],
    "views.jitter_probability": 0.8,
    "views.grayscale_probability": 0.2,
}
BICUBIC = {"crops": ("bicubic", "bilinear")}
TOKENS = {"decay of tokens": ("by weight_decay", "none")}

OFFICIAL = {
    "mae": Official(
        "facebookresearch/mae@efb2a80",
        {
            "PRETRAIN.md": {
                "encoder_preset": "large",
                "model_config.mask_ratio": 0.75,
                "model_config.norm_pix_loss": True,
                "learning_rate": 2.4e-3,  # 1.5e-4 x 4096 / 256
                "reference_batch_size": 4096,
                "batch_scaling": "linear",
                "weight_decay": 0.05,
                "warmup_steps": 0.05,  # 40 of 800 epochs
                "length": "800 epochs",
            },
            "main_pretrain.py": {
                "image_size": 224,
                "views.crop_scale": [0.2, 1.0],
                "views.flip_probability": 0.5,
                "views.vertical_flip_probability": 0.0,
                **ADAMW,
                **CROP_RATIO,
                "adam_beta2": 0.95,
                "lr_scheduler_type": "cosine",
                "layer_decay": 1.0,
            },
            "engine_pretrain.py": {"max_grad_norm": 0.0},
            "models_mae.py": {
                "encoder_config.patch_size": 16,
                "encoder_config.position_embedding_type": "sincos",
                "encoder_config.use_class_token": True,
                "encoder_config.drop_path_rate": 0.0,
                "model_config.use_cross_attention": False,
                "model_config.prediction_ratio": 1.0,
                "model_config.decoder_config.hidden_size": 512,
                "model_config.decoder_config.num_hidden_layers": 8,
                "model_config.decoder_config.num_attention_heads": 16,
            },
        },
        {
            "main_pretrain.py": {**BICUBIC, **TOKENS},
            "models_mae.py": {
                "initialisation of the encoder": ("Xavier's rule for linear layers", "deviation 0.02"),
                "initialisation of attention": ("of queries, keys and values as one matrix", "of each by itself"),
            },
        },
    ),
    "simmim": Official(
        "microsoft/SimMIM@d3e29bc",
        {
            "configs/vit_base__800ep/simmim_pretrain__vit_base__img224__800ep.yaml": {
                "encoder_preset": "base",
                "encoder_config.position_embedding_type": "relative",
                "encoder_config.drop_path_rate": 0.1,
                "image_size": 224,
                "model_config.mask_ratio": 0.6,
                "model_config.mask_patch_size": 32,
                "learning_rate": 1e-4,
                "weight_decay": 0.05,
                "warmup_steps": 0.0125,  # 10 of 800 epochs
                "lr_scheduler_type": "multistep",  # to a tenth after 700 epochs
                "length": "800 epochs",
            },
            "config.py": {
                "encoder_config.patch_size": 16,
                "encoder_config.layerscale_value": 0.1,
                **ADAMW,
                "adam_beta2": 0.999,
                "max_grad_norm": 5.0,
            },
            "main_simmim.py": {"reference_batch_size": 512, "batch_scaling": "linear"},
            "models/vision_transformer.py": {
                "encoder_config.use_class_token": True,
                "encoder_config.drop_path_uniform": False,
            },
            "data/data_simmim.py": {"views.crop_scale": [0.67, 1.0], "views.flip_probability": 0.5, **CROP_RATIO},
        },
        {
            "config.py": {"first learning rate": ("5e-7", "0")},
            "models/simmim.py": {"truncation of initial weights": ("at one deviation", "none")},
            "models/vision_transformer.py": {
                "initial weights by depth": (
                    "divided by sqrt(2 x depth) where a layer adds",
                    "the same at all depths",
                ),
            },
        },
    ),
    "ijepa": Official(
        "facebookresearch/ijepa@52c1ae9",
        {
            "configs/in1k_vith14_ep300.yaml": {
                "encoder_preset": "huge",
                "encoder_config.patch_size": 14,
                "image_size": 224,
                "model_config.predictor_config.hidden_size": 384,
                "model_config.predictor_config.num_hidden_layers": 12,
                "model_config.num_targets": 4,
                "model_config.target_scale": [0.15, 0.2],
                "model_config.target_aspect": [0.75, 1.5],
                "model_config.context_scale": [0.85, 1.0],
                "model_config.momentum": 0.996,
                "views.crop_scale": [0.3, 1.0],
                "views.flip_probability": 0.0,
                "learning_rate": 1e-3,
                "reference_batch_size": 2048,  # 16 GPUs of 128
                "batch_scaling": "not given",
                "weight_decay": 0.04,
                "weight_decay_end": 0.4,
                "warmup_steps": 0.13,  # 40 of 300 epochs
                "length": "300 epochs",
            },
            "src/transforms.py": CROP_RATIO,
            "src/helper.py": {
                **ADAMW,
                "adam_beta2": 0.999,
                "lr_scheduler_type": "cosine",
                "model_config.predictor_config.num_attention_heads": 16,  # as the encoder's
            },
            "src/train.py": {"max_grad_norm": 0.0, "momentum follows the batch": False},
            "src/models/vision_transformer.py": {
                "encoder_config.position_embedding_type": "sincos",
                "encoder_config.use_class_token": False,
            },
        },
        {
            "configs/in1k_vith14_ep300.yaml": {
                "first and last learning rate": ("2e-4 and 1e-6", "0 and 0"),
            },
            "src/masks/multiblock.py": {
                "size and shape of blocks": ("of one random number", "of two"),
                "places of blocks": ("not in the last row or column", "anywhere"),
                "context cut to one length": ("its last patches", "random patches"),
            },
            "src/train.py": {
                "schedule of the momentum": ("linear", "cosine"),
            },
            "src/helper.py": {
                **TOKENS,
                "initialisation of the predictor": ("deviation 0.02", "Xavier's rule"),
                "initial weights by depth": (
                    "the same at all depths",
                    "divided by sqrt(2 x depth) where a layer adds",
                ),
            },
        },
    ),
    "dinov2": Official(
        "facebookresearch/dinov2@b8931f7",
        {
            "dinov2/configs/train/vitl16_short.yaml": {"encoder_preset": "large"},
            "dinov2/configs/ssl_default_config.yaml": {
                "encoder_config.patch_size": 16,
                "encoder_config.drop_path_rate": 0.3,
                "encoder_config.drop_path_uniform": True,
                "encoder_config.layerscale_value": 1e-5,
                "encoder_config.num_register_tokens": 0,
                "encoder_config.position_interpolation": "bicubic_offset",
                "image_size": 224,
                "model_config.num_prototypes": 65536,
                "model_config.head_hidden_size": 2048,
                "model_config.bottleneck_size": 256,
                "model_config.separate_heads": False,
                "model_config.centering": "centering",
                "model_config.koleo_weight": 0.1,
                "model_config.ibot_weight": 1.0,
                "model_config.mask_probability": 0.5,
                "model_config.mask_ratio_range": [0.1, 0.5],
                "model_config.momentum": 0.992,
                "model_config.warmup_teacher_temperature": 0.04,
                "model_config.teacher_temperature": 0.07,
                "model_config.teacher_temperature_warmup": 0.3,  # 30 of 100 epochs
                "model_config.frozen_prototypes": 0.01,  # 1 of 100 epochs
                "views.crop_scale": [0.32, 1.0],
                "views.local.num_views": 8,
                "views.local.size": 96,
                "views.local.crop_scale": [0.05, 0.32],
                "learning_rate": 4e-3,
                "reference_batch_size": 1024,
                "batch_scaling": "sqrt",
                "weight_decay": 0.04,
                "weight_decay_end": 0.4,
                "warmup_steps": 0.1,  # 10 of 100 epochs
                "layer_decay": 0.9,
                "patch_projection_lr_multiplier": 0.2,
                "max_grad_norm": 3.0,
                "adam_beta1": 0.9,
                "adam_beta2": 0.999,
                "length": "100 epochs",
            },
            "dinov2/loss/dino_clstoken_loss.py": {
                "model_config.student_temperature": 0.1,
                "model_config.center_momentum": 0.9,
            },
            "dinov2/models/vision_transformer.py": {
                "encoder_config.position_embedding_type": "learned",
                "encoder_config.use_class_token": True,
            },
            "dinov2/data/augmentations.py": {
                "views.flip_probability": 0.5,
                "views.local.blur_probability": 0.5,
                **BYOL_COLORS,
                **CROP_RATIO,
            },
            # GaussianBlur blurs with the probability 1 - p: of p 1.0 and 0.1, which DINO has, never and mostly.
            "dinov2/data/transforms.py": {
                "views.views": [{"blur_probability": 0.0}, {"blur_probability": 0.9, "solarize_probability": 0.2}]
            },
            "dinov2/train/train.py": {
                "optim": "adamw",
                "lr_scheduler_type": "cosine",
                "momentum follows the batch": False,
            },
        },
        {
            "dinov2/configs/ssl_default_config.yaml": {
                "last learning rate": ("1e-6", "0"),
            },
            "dinov2/layers/dino_head.py": {"lengths of prototypes": ("learned from 1 on", "1")},
            "dinov2/models/vision_transformer.py": {
                "initialisation of class and mask token": ("1e-6 and 0", "deviation 0.02"),
                "initialisation of the patch projection": ("torch's rule", "deviation 0.02"),
            },
            "dinov2/utils/param_groups.py": TOKENS,
            "dinov2/train/train.py": {"gradient clipping": ("encoder and head apart", "together")},
            "dinov2/data/collate.py": {
                "mask ratios": ("at random within equal parts of the range", "the middles of the parts"),
            },
            "dinov2/data/masking.py": {"number of masked patches": ("may stay below the ratio", "the ratio's")},
            "dinov2/loss/koleo_loss.py": {"nearest image of KoLeo": ("of one process", "of all processes")},
            "dinov2/data/augmentations.py": BICUBIC,
        },
    ),
    "moco_v3": Official(
        "facebookresearch/moco-v3@c349e6e",
        {
            "CONFIG.md": {
                "encoder_preset": "small",
                "model_config.temperature": 0.2,
                "model_config.freeze_patch_projection": True,
                "learning_rate": 2.4e-3,  # 1.5e-4 x 4096 / 256
                "weight_decay": 0.1,
                "warmup_steps": 0.13,  # 40 of 300 epochs
                "length": "300 epochs",
                "optim": "adamw",
            },
            "main_moco.py": {
                "reference_batch_size": 4096,
                "batch_scaling": "linear",
                "image_size": 224,
                "model_config.projection_size": 256,
                "model_config.projection_hidden_size": 4096,
                "model_config.momentum": 0.99,
                "momentum follows the batch": False,
                "views.crop_scale": [0.08, 1.0],
                "views.flip_probability": 0.5,
                **BYOL_COLORS,
                **CROP_RATIO,
                "views.views": [{"blur_probability": 1.0}, {"blur_probability": 0.1, "solarize_probability": 0.2}],
                "adam_beta1": 0.9,
                "adam_beta2": 0.999,
                "lr_scheduler_type": "cosine",
                "max_grad_norm": 0.0,
            },
            "moco/builder.py": {"model_config.predictor_norm": True},
            "vits.py": {
                "encoder_config.patch_size": 16,
                "encoder_config.num_attention_heads": 12,
                "encoder_config.position_embedding_type": "sincos",
                "encoder_config.use_class_token": True,
            },
        },
        {
            "main_moco.py": {
                "weight decay": ("of all parameters", "of matrices"),
            },
        },
    ),
    "simclr": Official(
        "google-research/simclr@383d414",
        {
            "README.md": {
                "encoder_preset": "ResNet-50",
                "image_size": 224,
                "model_config.temperature": 0.1,
                "learning_rate": 1.2,  # 0.075 x sqrt(256)
                "reference_batch_size": 256,
                "batch_scaling": "sqrt",
                "weight_decay": 1e-4,
                "length": "100 epochs",
            },
            "run.py": {
                "model_config.projection_size": 128,
                "model_config.num_projection_layers": 3,
                "warmup_steps": 0.1,  # 10 of 100 epochs
                "optim": "lars",
                "adam_beta2": "none",
            },
            "model_util.py": {
                "model_config.projection_hidden_size": 2048,
                "lr_scheduler_type": "cosine",
                "max_grad_norm": 0.0,
            },
            "data_util.py": {
                "views.num_views": 2,
                "views.crop_scale": [0.08, 1.0],
                "views.flip_probability": 0.5,
                "views.jitter": [0.8, 0.8, 0.8, 0.2],
                "views.jitter_probability": 0.8,
                "views.grayscale_probability": 0.2,
                "views.blur_probability": 0.5,
                **CROP_RATIO,
            },
        },
        {
            "model_util.py": {
                "last batch norm": ("with a gain", "without"),
                "initialisation of the head": ("deviation 0.01", "torch's rule"),
            },
            "data_util.py": BICUBIC,
        },
    ),
    "lejepa": Official(
        "rbalestr-lab/lejepa@eddffdd",
        {
            "README.md": {
                "encoder_preset": "large",
                "encoder_config.patch_size": 14,  # of which 98 pixels are a multiple
                "image_size": 224,
                "model_config.num_slices": 1024,
                "model_config.num_knots": 17,
                "views.num_views": 2,
                "views.crop_scale": [0.3, 1.0],
                "views.flip_probability": 0.5,
                **BYOL_COLORS,
                "views.blur_probability": 0.5,
                "views.solarize_probability": 0.2,
                "views.local.num_views": 6,
                "views.local.size": 98,
                "views.local.crop_scale": [0.05, 0.3],
                "learning_rate": 5e-4,
                "reference_batch_size": "not given",
                "batch_scaling": "not given",
                "weight_decay": 0.05,
                "lr_scheduler_type": "cosine",
                "length": "100 epochs",
                **ADAMW,
            },
            "MINIMAL.md": {
                "encoder_config.drop_path_rate": 0.1,
                "model_config.sigreg_weight": 0.02,
                "model_config.projection_hidden_size": 2048,
                "model_config.projection_size": 16,
                "model_config.join_views": False,
                "warmup_steps": 0.00125,  # 1 of 800 epochs
                "max_grad_norm": 0.0,
            },
            "lejepa/univariate/epps_pulley.py": {"model_config.max_knot": 3.0},
        },
        {"README.md": {"last learning rate": ("a thousandth of the largest", "0")}},
    ),
    "detection": Official(
        "Atten4Vis/LW-DETR@d5e6e6c",
        {
            "scripts/lwdetr_medium_coco_train.sh": {
                "encoder_preset": "small",
                "encoder_config.num_hidden_layers": 10,
                "model_config.num_decoder_layers": 3,
                "model_config.hidden_size": 256,
                "model_config.num_self_attention_heads": 8,
                "model_config.num_cross_attention_heads": 16,
                "model_config.num_points": 2,
                "model_config.class_loss_weight": 1,
                "learning_rate": 1e-4,
                "encoder_lr_multiplier": 0.735,  # 1.5e-4 / 1e-4 x 0.7^2
                "layer_decay": 0.7,
                "weight_decay": 1e-4,
                "lr_scheduler_type": "constant",
                "length": "60 epochs",
            },
            "main.py": {
                "model_config.intermediate_size": 2048,
                "model_config.num_queries": 300,
                "model_config.class_cost": 2,
                "model_config.bbox_cost": 5,
                "model_config.giou_cost": 2,
                "model_config.bbox_loss_weight": 5,
                "model_config.giou_loss_weight": 2,
                "max_grad_norm": 0.1,
                "warmup_steps": 0.0,
                **ADAMW,
                "adam_beta2": 0.999,
            },
            "models/backbone/backbone.py": {
                "encoder_config.patch_size": 16,
                "encoder_config.num_attention_heads": 12,
                "encoder_config.position_embedding_type": "learned",
                "encoder_config.drop_path_rate": 0.0,
            },
            "models/backbone/projector.py": {"model_config.neck_num_blocks": 3},
            "datasets/coco.py": {
                "image_size": "448 to 896",
                "augmentation.flip_probability": 0.5,
                "augmentation.vertical_flip_probability": 0.0,
                "augmentation.crop_probability": 0.5,
                "augmentation.crop_scale": "384 to 600 pixels of 400 to 600",
                "augmentation.crop_ratio": "by its sides",
                "augmentation.jitter": [0.0, 0.0, 0.0, 0.0],
            },
        },
        {
            "scripts/lwdetr_medium_coco_train.sh": {
                "one-to-many training": ("13 groups of queries", "a dense head"),
                "rate of the decoder": ("0.7 of learning_rate", "learning_rate"),
                "attention of the encoder": ("in windows in six layers", "global"),
                "average of the weights": ("0.9997", "none"),
            },
            "models/transformer.py": {"boxes of the anchors": ("0.05 of the image", "two cells")},
        },
    ),
    "instance_segmentation": Official(
        "roboflow/rf-detr@1.11.2",
        {
            "rfdetr/config.py": {  # of RFDETRSegSmall
                "encoder_preset": "small",
                "encoder_config.patch_size": 12,
                "encoder_config.num_hidden_layers": 12,
                "encoder_config.num_attention_heads": 6,
                "encoder_config.position_embedding_type": "learned",
                "encoder_config.drop_path_rate": 0.0,
                "image_size": 384,
                "model_config.num_decoder_layers": 4,
                "model_config.hidden_size": 256,
                "model_config.num_self_attention_heads": 8,
                "model_config.num_cross_attention_heads": 16,
                "model_config.num_points": 2,
                "model_config.num_queries": 100,
                "model_config.class_loss_weight": 1,
                "model_config.mask_stride": 4,
                "model_config.mask_point_ratio": 16,
                "model_config.mask_loss_weight": 5,
                "model_config.dice_loss_weight": 5,
                "learning_rate": 1e-4,
                "encoder_lr_multiplier": 0.735,  # 1.5e-4 / 1e-4 x 0.7^2
                "layer_decay": 0.8,
                "weight_decay": 1e-4,
                "lr_scheduler_type": "step",
                "warmup_steps": 0.0,
                "max_grad_norm": 0.1,
                "length": "100 epochs",
            },
            "rfdetr/models/_defaults.py": {
                "model_config.intermediate_size": 2048,
                "model_config.class_cost": 2,
                "model_config.bbox_cost": 5,
                "model_config.giou_cost": 2,
                "model_config.bbox_loss_weight": 5,
                "model_config.giou_loss_weight": 2,
                **ADAMW,
                "adam_beta2": 0.999,
            },
            "rfdetr/models/matcher.py": {"model_config.mask_cost": 5, "model_config.dice_cost": 5},
            "rfdetr/models/backbone/projector.py": {"model_config.neck_num_blocks": 3},
            "rfdetr/models/heads/segmentation.py": {"model_config.mask_feature_size": 256},
            "rfdetr/datasets/aug_configs.py": {
                "augmentation.flip_probability": 0.5,
                "augmentation.vertical_flip_probability": 0.0,
                "augmentation.jitter": [0.0, 0.0, 0.0, 0.0],
            },
            "rfdetr/datasets/coco.py": {
                "augmentation.crop_probability": 0.5,
                "augmentation.crop_scale": "384 to 600 pixels of 400 to 600",
                "augmentation.crop_ratio": "by its sides",
            },
        },
        {
            "rfdetr/config.py": {
                "one-to-many training": ("13 groups of queries", "a dense head"),
                "rate of the decoder": ("0.7 of learning_rate", "learning_rate"),
                "attention of the encoder": ("in two windows", "global"),
                "average of the weights": ("0.993", "none"),
            },
            "rfdetr/models/transformer.py": {"boxes of the anchors": ("0.05 of the image", "two cells")},
            "rfdetr/models/criterion.py": {"points of the mask loss": ("anywhere", "half of them at the objects")},
            "rfdetr/models/heads/segmentation.py": {
                "blocks of the mask head": ("depthwise convolutions", "plain ones"),
                "input of the mask head": ("the neck's map", "the image too"),
                "places of masks": ("by features alone", "ellipses in the boxes too"),
            },
        },
    ),
    "classification": Official(
        "facebookresearch/mae@efb2a80",
        {
            "FINETUNE.md": {
                "encoder_preset": "base",
                "encoder_config.drop_path_rate": 0.1,
                "augmentation.mixup_alpha": 0.8,
                "augmentation.cutmix_alpha": 1.0,
                "augmentation.erasing_probability": 0.25,
                "learning_rate": 5e-4,
                "reference_batch_size": 256,
                "batch_scaling": "linear",
                "layer_decay": 0.65,
                "encoder_lr_multiplier": 1.0,
                "weight_decay": 0.05,
                "length": "100 epochs",
            },
            "main_finetune.py": {
                "image_size": 224,
                "model_config.label_smoothing": 0.1,
                "model_config.pooling": "mean",
                "warmup_steps": 0.05,  # 5 of 100 epochs
                "lr_scheduler_type": "cosine",
                "max_grad_norm": 0.0,
                **ADAMW,
                "adam_beta2": 0.999,
            },
            "util/datasets.py": {
                "augmentation.crop_scale": [0.08, 1.0],
                "augmentation.flip_probability": 0.5,
                "augmentation.jitter": "RandAugment",
                "augmentation.jitter_probability": "RandAugment",
            },
            "models_vit.py": {
                "encoder_config.patch_size": 16,
                "encoder_config.position_embedding_type": "learned",
                "encoder_config.drop_path_uniform": False,
            },
        },
        {
            "main_finetune.py": {
                "last learning rate": ("1e-6", "0"),
                "initialisation of the classifier": ("deviation 2e-5", "deviation 0.02"),
            },
            "util/datasets.py": BICUBIC,
        },
    ),
    "image_text": Official(
        "google-research/big_vision@3b8e5ab",
        {
            "big_vision/configs/proj/image_text/siglip_lit_coco.py": {
                "encoder_preset": "B/16",
                "encoder_config.patch_size": 16,
                "image_size": 224,
                "text_encoder": "bert_base",
                "model_config.text_config.hidden_size": 768,
                "model_config.text_config.intermediate_size": 3072,
                "model_config.text_config.num_hidden_layers": 12,
                "model_config.text_config.num_attention_heads": 12,
                "text_length": 16,
                "length": "5000 steps",
                "reference_batch_size": 512,
                "learning_rate": 1e-3,
                "weight_decay": 0.01,
                "warmup_steps": 0.03,  # 150 of 5000
                "lr_scheduler_type": "cosine",
                "max_grad_norm": 1.0,
                **ADAMW,
                "model_config.loss_type": "sigmoid",
                "model_config.initial_bias": -2.71,
                "model_config.lock_encoder": True,
                "model_config.num_extra_blocks": 0,
                "model_config.use_patch_mean": False,
                "model_config.projection_size": 768,
                "views.num_views": 1,
                "views.crop_scale": "none",
                "views.flip_probability": 0.5,
            },
        },
        {
            "big_vision/configs/proj/image_text/siglip_lit_coco.py": {
                "colours and shapes": ("randaug(2,10)", "unchanged"),
                "projection of images": ("none", "linear"),
            },
        },
    ),
    "semantic_segmentation": Official(
        "facebookresearch/dinov3@78dc9b8",
        {
            "dinov3/eval/segmentation/configs/config-ade20k-linear-training.yaml": {
                "encoder_preset": "any of DINOv3's",
                "image_size": 512,
                "augmentation.crop_scale": "0.5 to 2 times the image's shorter side",
                "augmentation.flip_probability": 0.5,
                "learning_rate": 1e-3,
                "weight_decay": 1e-3,
                "warmup_steps": 0.0375,  # 1500 of 40000
                "lr_scheduler_type": "cosine",
                "length": "40000 steps",
                "max_grad_norm": 0.0,
                **ADAMW,
                "adam_beta2": 0.999,
                "model_config.num_feature_layers": 1,
            },
            "dinov3/eval/segmentation/models/__init__.py": {
                "model_config.freeze_encoder": True,
                "encoder_config.patch_size": 16,
                "encoder_config.position_embedding_type": "rope",
                "encoder_config.drop_path_rate": 0.0,
                "encoder_lr_multiplier": "frozen",
                "layer_decay": "frozen",
            },
            "dinov3/eval/segmentation/transforms.py": {
                "augmentation.crop_probability": 1.0,
                "augmentation.crop_ratio": "by its sides",
                "augmentation.max_class_fraction": 0.75,
                "augmentation.vertical_flip_probability": 0.0,
                "augmentation.jitter": "PhotoMetricDistortion",
                "augmentation.jitter_probability": "0.5 of each",
            },
        },
        {
            "dinov3/eval/segmentation/config.py": {"inference": ("windows of 512 pixels", "whole images")},
            "dinov3/eval/segmentation/transforms.py": {"positions of a window": ("10", "8")},
            "dinov3/eval/segmentation/models/heads/linear_head.py": {
                "dropout of the features": ("0.1", "none"),
                "initialisation of the classifier": ("deviation 0.01", "deviation 0.02"),
            },
        },
    ),
    "mask_query_segmentation": Official(
        "tue-mps/eomt@7bd19dd",
        {
            "configs/dinov2/ade20k/semantic/eomt_large_512.yaml": {
                "encoder_preset": "large",
                "model_config.num_queries": 100,
                "length": "31 epochs",
            },
            "models/vit.py": {
                "encoder_config.patch_size": 16,
                "encoder_config.position_embedding_type": "learned",
                "encoder_config.num_register_tokens": 4,
                "encoder_config.layerscale_value": 1e-5,
                "encoder_config.drop_path_rate": 0.0,
            },
            "models/eomt.py": {
                "model_config.num_query_layers": 4,
                "model_config.use_masked_attention": True,
                "model_config.mask_feature_size": 1024,
                "model_config.freeze_encoder": False,
            },
            "training/mask_classification_semantic.py": {
                "model_config.class_loss_weight": 2,
                "model_config.mask_loss_weight": 5,
                "model_config.dice_loss_weight": 5,
                "model_config.no_object_weight": 0.1,
                "model_config.mask_point_ratio": "12544 points",
                "learning_rate": 1e-4,
                "layer_decay": 0.8,
                "encoder_lr_multiplier": 1.25,  # the last layer has the whole rate
                "weight_decay": 0.05,
                "frozen_encoder_steps": 500,
                "warmup_steps": "500 for the head and then 1000 for the encoder",
                "lr_scheduler_type": "polynomial of power 0.9",
            },
            "training/lightning_module.py": {**ADAMW, "adam_beta2": 0.999},
            "main.py": {"max_grad_norm": 0.01},
            "datasets/ade20k_semantic.py": {"image_size": 512},
            "datasets/transforms.py": {
                "augmentation.crop_probability": 1.0,
                "augmentation.crop_scale": "0.5 to 2 times the image fitted to the input",
                "augmentation.crop_ratio": "by its sides",
                "augmentation.max_class_fraction": 1.0,
                "augmentation.flip_probability": 0.5,
                "augmentation.vertical_flip_probability": 0.0,
                "augmentation.jitter": "brightness, contrast, saturation and hue",
                "augmentation.jitter_probability": "0.5 of each",
            },
        },
        {
            "models/scale_block.py": {
                "blocks of the upscaling": ("depthwise convolutions", "plain ones of few channels")
            },
            "models/eomt.py": {"initialisation of the head": ("torch's", "Xavier's, masks divided by 8")},
            "training/lightning_module.py": {
                "decay of tokens and vectors": ("by weight_decay", "none"),
                "inference": ("windows of 512 pixels", "whole images"),
            },
            "training/mask_classification_loss.py": {
                "points of the mask loss": ("of all pixels for each mask", "of labelled pixels for each image"),
                "class loss": ("a mean per process", "over all"),
            },
            "training/mask_classification_semantic.py": {
                "scores of pixels": ("of masks enlarged to the image", "enlarged after the sum")
            },
        },
    ),
}

# Methods that no other code has as they are here.
WITHOUT_OFFICIAL = ("distill",)

# The preset's, where a recipe does not choose others.
SHAPE_KEYS = (
    "encoder_config.hidden_size",
    "encoder_config.num_hidden_layers",
    "encoder_config.num_attention_heads",
)

# Keys that say where a run reads and writes, how it is spread over a machine and what it shows.
RUN_KEYS = (
    *(
        "method",
        "data",
        "labels_from",
        "rounds",
        "output_dir",
        "num_train_examples",
        "num_eval_examples",
        "seed",
        "max_steps",
    ),
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
    *("dataloader_num_workers", "logging_steps", "eval_strategy", "eval_steps", "images_to_see"),
    *("save_strategy", "save_steps", "save_total_limit"),
)
