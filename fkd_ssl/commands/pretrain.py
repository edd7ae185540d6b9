"""Pretrains a teacher on a folder of images: MoCo v2 or SwAV, with lightly's parts, saved in the method's own layout.

For ImageNet use a published teacher (fkd-ssl teachers); this is for images of your own. The same options continue a
killed run.
"""

from fkd_ssl.pretraining.config import PretrainConfig as Config


def run(config: Config) -> int:
    """Pretrains and says where the teacher is."""
    from fkd_ssl.commands import console
    from fkd_ssl.pretraining.engine import pretrain

    checkpoint = pretrain(config, log=console.say)
    console.show(f"{checkpoint}: pass it as --teacher {config.method} --checkpoint {checkpoint}")
    return 0
