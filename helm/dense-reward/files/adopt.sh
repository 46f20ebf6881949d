# Adopts two models of the hub below $CHECKPOINTS; what an earlier try has finished stays. Run by `sh -e`.
adopt() {
  test -e "$CHECKPOINTS/$3/manifest.json" ||
    dense-reward adopt "$1" --role "$2" --out "$CHECKPOINTS/$3" \
      ${RUN_ID:+--run-id "$RUN_ID"} ${RENDERER:+--renderer "$RENDERER"}
}
adopt "$SFT" sft "$SFT_FOLDER"
adopt "$REFERENCE" reference "$REFERENCE_FOLDER"
