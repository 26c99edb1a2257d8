import yaml

from promag.evaluation.speed.subjects import count_coding, peer_subject, tokenizer_subject
from promag.training.config import load_yaml


def test_the_base_preset_takes_less_than_half_of_the_arithmetic_of_wan():
    def gflop(subject, ratio):
        counted = count_coding(subject, (17, 32, 32), ratio)
        return counted["encode_gflop"] + counted["decode_gflop"]

    wan = gflop(peer_subject("AutoencoderKLWan"), 4)
    assert gflop(tokenizer_subject("tokenizer/base"), 16) < 0.5 * wan
    assert gflop(tokenizer_subject("tokenizer/small"), 16) < 0.1 * wan


def test_sides_follow_the_spatial_ratio_of_a_preset(tmp_path):
    values = load_yaml("tokenizer/tiny")
    values["model"]["patch_size"] = 8
    (tmp_path / "coarse.yaml").write_text(yaml.safe_dump(values))
    assert tokenizer_subject(str(tmp_path / "coarse.yaml")).spatial == 16
    assert tokenizer_subject("tokenizer/tiny").spatial == 8
