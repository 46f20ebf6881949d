{{/* Names and labels. */}}

{{- define "dense-reward.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 46 | trimSuffix "-" -}}
{{- end -}}

{{- define "dense-reward.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 46 | trimSuffix "-" -}}
{{- else if contains (include "dense-reward.name" .) .Release.Name -}}
{{- .Release.Name | replace "." "-" | trunc 46 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "dense-reward.name" .) | replace "." "-" | trunc 46 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "dense-reward.selectorLabels" -}}
app.kubernetes.io/name: {{ include "dense-reward.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{/* Selects only the pods that serve: those of the trainer and the test have another component. */}}
{{- define "dense-reward.serviceLabels" -}}
{{ include "dense-reward.selectorLabels" . }}
app.kubernetes.io/component: service
{{- end -}}

{{- define "dense-reward.labels" -}}
{{ include "dense-reward.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "dense-reward.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "dense-reward.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* Arguments: root, image, flavour. Never both tag and digest: some container runtimes refuse that. */}}
{{- define "dense-reward.reference" -}}
{{- $repository := .image.repository -}}
{{- $registry := dig "imageRegistry" "" (default dict .root.Values.global) -}}
{{- if and $registry (not (regexMatch "^[^/]*[.:][^/]*/" $repository)) -}}
{{- $repository = printf "%s/%s" (trimSuffix "/" $registry) $repository -}}
{{- end -}}
{{- if .image.digest -}}
{{- printf "%s@%s" $repository .image.digest -}}
{{- else -}}
{{- printf "%s:%s" $repository (default (printf "%s-%s" .root.Chart.AppVersion .flavour) .image.tag) -}}
{{- end -}}
{{- end -}}

{{- define "dense-reward.image" -}}
{{- $flavour := ternary "cuda" "cpu" (gt (int .Values.requestGPU) 0) -}}
{{- $flavour = ternary "vllm" $flavour (eq .Values.settings.engine "vllm") -}}
{{- include "dense-reward.reference" (dict "root" . "image" .Values.image "flavour" $flavour) -}}
{{- end -}}

{{/* Arguments: root, job. */}}
{{- define "dense-reward.trainerImage" -}}
{{- $own := .root.Values.trainer.image -}}
{{- $flavour := ternary "cuda" "cpu" (gt (int .job.requestGPU) 0) -}}
{{- $image := ternary $own .root.Values.image (ne $own.repository "") -}}
{{- include "dense-reward.reference" (dict "root" .root "image" $image "flavour" $flavour) -}}
{{- end -}}

{{- define "dense-reward.claim" -}}
{{- default (printf "%s-checkpoints" (include "dense-reward.fullname" .)) .Values.checkpoints.pvc.existingClaim -}}
{{- end -}}

{{- define "dense-reward.scheme" -}}
{{- ternary "https" "http" (ne .Values.tls.secretName "") -}}
{{- end -}}

{{- define "dense-reward.url" -}}
{{- printf "%s:%d" (include "dense-reward.fullname" .) (int .Values.service.port) -}}
{{- end -}}

{{/* A value as text for an environment variable. Helm reads YAML's numbers as floats and would print 1.048576e+06. */}}
{{- define "dense-reward.text" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) -}}
{{- int64 . -}}
{{- else -}}
{{- . -}}
{{- end -}}
{{- end -}}
