# Adopts two models of the hub into folders below $CHECKPOINTS. Keeps models that an earlier run finished. Run with `sh -e`.
adopt() {
  test -e "$CHECKPOINTS/$3/manifest.json" ||
    dense-reward adopt "$1" --role "$2" --out "$CHECKPOINTS/$3" \
      ${RUN_ID:+--run-id "$RUN_ID"} ${RENDERER:+--renderer "$RENDERER"}
}
adopt "$SFT" sft "$SFT_FOLDER"
adopt "$REFERENCE" reference "$REFERENCE_FOLDER"
