# Adopts two models of the hub into folders below $CHECKPOINTS, one pod at a time: what an earlier one, or an earlier
# run, has finished is kept. Run with `sh -e`.
mkdir -p "$CHECKPOINTS"
exec 9>"$CHECKPOINTS/.adopting"
flock 9
adopt() {
  test -e "$CHECKPOINTS/$3/manifest.json" ||
    dense-reward adopt "$1" --role "$2" --out "$CHECKPOINTS/$3" \
      ${RUN_ID:+--run-id "$RUN_ID"} ${RENDERER:+--renderer "$RENDERER"}
}
adopt "$SFT" sft "$SFT_FOLDER"
adopt "$REFERENCE" reference "$REFERENCE_FOLDER"
