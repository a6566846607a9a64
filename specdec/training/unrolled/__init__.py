"""What trainings by steps share, which unroll the drafter after every token of a text: EAGLE-3, P-EAGLE, MTP."""
