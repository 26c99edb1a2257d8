from promag.evaluation.speed.subjects import count_coding, peer_subject, tokenizer_subject


def test_the_base_preset_takes_less_than_half_of_the_arithmetic_of_wan():
    def gflop(subject, ratio):
        counted = count_coding(subject, (17, 32, 32), ratio)
        return counted["encode_gflop"] + counted["decode_gflop"]

    wan = gflop(peer_subject("AutoencoderKLWan"), 4)
    assert gflop(tokenizer_subject("tokenizer/base"), 16) < 0.5 * wan
    assert gflop(tokenizer_subject("tokenizer/small"), 16) < 0.1 * wan
