{{/* What the service reads: its environment and the pairs file. A change of either restarts the replicas one by one. */}}

{{- define "dense-reward.environment" -}}
{{- $c := .Values.checkpoints -}}
{{- $settings := deepCopy .Values.settings -}}
{{- if and (eq $settings.engine "torch") (not .Values.requestGPU) (not $settings.threads) }}
{{- $_ := set $settings "threads" (include "dense-reward.cores" .) }}
{{- end }}
{{- include "dense-reward.setDevices" (dict "gpus" (int .Values.requestGPU) "settings" $settings) }}
{{- range $name, $value := $settings }}
{{- if not (kindIs "invalid" $value) }}
DENSE_REWARD_{{ upper $name }}: {{ include "dense-reward.text" $value | quote }}
{{- end }}
{{- end }}
DENSE_REWARD_HOST: "0.0.0.0"
DENSE_REWARD_PORT: "8000"
{{- if ne $c.source "none" }}
DENSE_REWARD_CHECKPOINTS_FOLDER: {{ $c.mountPath | quote }}
{{- if $c.pairs }}
DENSE_REWARD_PAIRS_FILE: /etc/dense-reward/pairs/pairs.json
{{- else }}
DENSE_REWARD_SFT: {{ printf "%s/%s" $c.mountPath (include "dense-reward.sftFolder" .) | quote }}
DENSE_REWARD_REFERENCE: {{ printf "%s/%s" $c.mountPath (include "dense-reward.referenceFolder" .) | quote }}
{{- end }}
{{- end }}
{{- if .Values.apiKeys.secretName }}
DENSE_REWARD_API_KEYS_FILE: {{ printf "/etc/dense-reward/keys/%s" .Values.apiKeys.secretKey | quote }}
{{- end }}
{{- if .Values.engineKey.secretName }}
DENSE_REWARD_ENGINE_KEY_FILE: {{ printf "/etc/dense-reward/engine/%s" .Values.engineKey.secretKey | quote }}
{{- end }}
{{- if .Values.tls.secretName }}
DENSE_REWARD_TLS_CERTIFICATE: /etc/dense-reward/tls/tls.crt
DENSE_REWARD_TLS_PRIVATE_KEY: /etc/dense-reward/tls/tls.key
{{- end }}
{{- end -}}

{{/*
Names the devices where a replica has GPUs, so that it fails instead of serving on its CPUs if it cannot use them.
Two models share one GPU; of an even number each gets half.
*/}}
{{- define "dense-reward.setDevices" -}}
{{- $s := .settings -}}
{{- $isNamed := not (has (toString (default "auto" $s.device)) (list "auto" "cuda")) -}}
{{- if and (eq $s.engine "torch") .gpus (not $isNamed) -}}
{{- $_ := set $s "device" (ternary "cuda" "cuda:0" (eq .gpus 1)) -}}
{{- if gt .gpus 1 -}}
{{- $_ := set $s "reference_device" (default "cuda:1" $s.reference_device) -}}
{{- end -}}
{{- else if and (eq $s.engine "vllm") (not $isNamed) (not $s.reference_device) -}}
{{- $each := int (default (ternary (div .gpus 2) .gpus (eq (mod .gpus 2) 0)) $s.tensor_parallel) -}}
{{- $_ := set $s "tensor_parallel" $each -}}
{{- if eq .gpus (mul 2 $each | int) -}}
{{- $_ := set $s "device" (printf "cuda:%s" (join "," (until $each))) -}}
{{- $_ := set $s "reference_device" (printf "cuda:%s" (join "," (untilStep $each .gpus 1))) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Whole cores of a replica. Without this number torch starts one thread for each core of the node. */}}
{{- define "dense-reward.cores" -}}
{{- $cpu := toString (default .Values.requestCPU .Values.limitCPU) -}}
{{- $cores := float64 (trimSuffix "m" $cpu) -}}
{{- if hasSuffix "m" $cpu -}}
{{- $cores = divf $cores 1000 -}}
{{- end -}}
{{- max 1 (floor $cores | int) -}}
{{- end -}}

{{- define "dense-reward.pairs" -}}
{{- $c := .Values.checkpoints -}}
{{- $pairs := list }}
{{- range $c.pairs }}
{{- $sft := printf "%s/%s" $c.mountPath .sft }}
{{- $reference := printf "%s/%s" $c.mountPath .reference }}
{{- $pairs = append $pairs (dict "name" .name "sft" $sft "reference" $reference) }}
{{- end }}
{{- toPrettyJson $pairs -}}
{{- end -}}
