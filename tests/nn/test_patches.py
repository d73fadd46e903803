"""Where patches lie, against a slow reader that goes symbol by symbol."""

import random

import pytest
import torch

from limbeck.core.symbols import BOS, EOD, EOP, PAD, SYMBOLS
from limbeck.nn.patches import forbidden_logit, forbidden_symbols, read_patches

P = 4


def slow_read(row, documents, *, patch_bytes, begun=False):
    """Patches of one row as lists of positions, () for a virtual one, with (document, is_complete) for each."""
    patches, last_document, is_open = [], object(), False
    for t, symbol in enumerate(row):
        if symbol == PAD:
            continue
        if documents[t] != last_document:
            if symbol != BOS or (begun and not patches):
                patches.append([documents[t], True, []])
            is_open, last_document = False, documents[t]
        full = is_open and len(patches[-1][2]) == patch_bytes - 1 and symbol != EOP
        if not is_open or full or symbol == BOS:
            if is_open:
                patches[-1][1] = True
            patches.append([documents[t], False, []])
        patches[-1][2].append(t)
        is_open = symbol < PAD
        patches[-1][1] = not is_open
    return patches


def random_rows(seed, *, rows=5, length=40, specials=0.3, grammatical=False):
    draw = random.Random(seed)
    out = []
    for _ in range(rows):
        row = []
        while len(row) < length:
            if grammatical:
                if draw.random() < 0.15:
                    row.append(EOD)
                else:
                    row += [draw.randrange(256) for _ in range(draw.randint(1, P - 1))] + [EOP]
            else:
                row.append(draw.choice([BOS, EOD, EOP, PAD]) if draw.random() < specials else draw.randrange(256))
        out.append(row[draw.randint(0, 3) :][:length] if len(row) > length + 3 else row[:length])
    return torch.tensor(out)


@pytest.mark.parametrize("seed", range(30))
def test_agrees_with_reading_symbol_by_symbol(seed):
    draw = random.Random(seed)
    ids_BT = random_rows(seed, specials=draw.choice([0.05, 0.3, 0.7]))
    documents_BT = torch.tensor([[0] * 13 + [1] * 10 + [0] * 17] * 5) if seed % 2 else None
    begun_B = torch.tensor([draw.random() < 0.5 for _ in range(5)]) if seed % 4 == 0 else None
    layout = read_patches(ids_BT, patch_bytes=P, document_ids_BT=documents_BT, begun_B=begun_B)
    index, states_found = 0, []
    for b, row in enumerate(ids_BT.tolist()):
        documents = [0] * 40 if documents_BT is None else documents_BT[b].tolist()
        patches = slow_read(row, documents, patch_bytes=P, begun=begun_B is not None and bool(begun_B[b]))
        number = 0
        for place, (document, is_complete, positions) in enumerate(patches):
            followed = place + 1 < len(patches) and patches[place + 1][0] == document and patches[place + 1][2]
            state = number if is_complete or followed else -1
            number += state >= 0
            assert layout.rows_M[index] == b
            assert layout.sizes_M[index] == len(positions)
            assert layout.states_M[index] == state
            states_found.append(state)
            for slot, t in enumerate(positions):
                assert layout.patch_BT[b, t] == place
                assert layout.slot_BT[b, t] == slot
            index += 1
        assert int(layout.mask_BS[b].sum()) == number
    assert index == len(layout.rows_M)
    assert layout.states == max(states_found) + 1
    torch.testing.assert_close(layout.slot_BT >= 0, ids_BT != PAD)


def test_states_that_predict_by_hand():
    """ab| c| EOD EOP-less d: the state after each closing symbol, and the one before inside a patch."""
    a, b, c, d = b"abcd"
    layout = read_patches(torch.tensor([[a, b, EOP, c, EOP, EOD, d]]), patch_bytes=P)
    assert layout.state_BT.tolist() == [[0, 0, 1, 1, 2, 3, 3]]
    assert layout.slot_BT.tolist() == [[0, 1, 2, 0, 1, 0, 0]]
    assert layout.patch_BT.tolist() == [[1, 1, 1, 2, 2, 3, 4]]
    assert layout.standing_N.tolist() == [1, 2, 0, 1, 0, 0, 1]
    assert layout.states_M.tolist() == [0, 1, 2, 3, -1]
    with_bos = read_patches(torch.tensor([[BOS, a, b, EOP]]), patch_bytes=P)
    assert with_bos.state_BT.tolist() == [[0, 0, 0, 1]]


def test_a_cut_row_may_begin_with_the_end_of_a_patch():
    layout = read_patches(torch.tensor([[EOP, 65, EOP]]), patch_bytes=P)
    assert layout.state_BT.tolist() == [[1, 1, 2]]


@pytest.mark.parametrize("seed", range(6))
def test_what_a_symbol_belongs_to_does_not_depend_on_later_ones(seed):
    ids_BT = random_rows(seed)
    whole = read_patches(ids_BT, patch_bytes=P)
    for cut in (1, 7, 20, 33):
        part = read_patches(ids_BT[:, :cut], patch_bytes=P)
        torch.testing.assert_close(part.slot_BT, whole.slot_BT[:, :cut])
        torch.testing.assert_close(part.state_BT, whole.state_BT[:, :cut])


def test_padding_anywhere_changes_nothing():
    row = random_rows(4, rows=1, grammatical=True)
    alone = read_patches(row, patch_bytes=P)
    spread = torch.full((1, 90), PAD)
    places = torch.randperm(90)[:40].sort().values
    spread[0, places] = row[0]
    layout = read_patches(spread, patch_bytes=P)
    torch.testing.assert_close(layout.state_BT[:, places], alone.state_BT)
    torch.testing.assert_close(layout.slot_BT[:, places], alone.slot_BT)
    masked = spread.clone()
    masked[spread == PAD] = 65
    by_mask = read_patches(masked, patch_bytes=P, mask_BT=spread != PAD)
    torch.testing.assert_close(by_mask.state_BT, layout.state_BT)


def test_empty_rows_have_no_patches():
    layout = read_patches(torch.full((2, 3), PAD), patch_bytes=P)
    assert layout.states == 0
    assert layout.state_BT.tolist() == [[-1] * 3] * 2
    one = read_patches(torch.tensor([[PAD, PAD], [PAD, 65]]), patch_bytes=P)
    assert one.mask_BS.tolist() == [[False], [True]]


def test_documents_of_states():
    ids_BT = torch.tensor([[65, EOP, EOD, 66, 67], [65, EOP, EOD, EOD, EOD]])
    assert read_patches(ids_BT, patch_bytes=P).document_ids_BS is None
    documents_BT = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]])
    layout = read_patches(ids_BT, patch_bytes=P, document_ids_BT=documents_BT)
    assert layout.document_ids_BS.tolist() == [[0, 0, 0, 1, -1], [2, 2, 2, 2, 2]]
    same = torch.zeros_like(documents_BT)
    assert read_patches(ids_BT, patch_bytes=P, document_ids_BT=same).document_ids_BS is None


def test_forbidden_symbols():
    table = forbidden_symbols(P)
    allowed = [[symbol for symbol in range(SYMBOLS) if not row[symbol]] for row in table]
    every_byte = list(range(256))
    assert allowed == [[*every_byte, EOD], [*every_byte, EOP], [*every_byte, EOP], [EOP]]
    assert forbidden_logit(torch.float32) == forbidden_logit(torch.bfloat16) == -1e10
    assert torch.isfinite(torch.tensor(forbidden_logit(torch.float16), dtype=torch.float16))
