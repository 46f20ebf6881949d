{{/* Where the checkpoints come from. */}}

{{- define "dense-reward.isDownloaded" -}}
{{- if has .Values.checkpoints.source (list "s3" "hub") -}}true{{- end -}}
{{- end -}}

{{- define "dense-reward.checkpointsVolume" -}}
{{- $c := .Values.checkpoints -}}
- name: checkpoints
{{- if eq $c.source "pvc" }}
  persistentVolumeClaim:
    claimName: {{ include "dense-reward.claim" . | quote }}
{{- else if eq $c.source "image" }}
  image:
    reference: {{ $c.image.reference | quote }}
    pullPolicy: {{ $c.image.pullPolicy }}
{{- else if $c.downloadStorageClass }}
  ephemeral:
    volumeClaimTemplate:
      spec:
        accessModes: [ReadWriteOnce]
        storageClassName: {{ $c.downloadStorageClass | quote }}
        resources:
          requests:
            storage: {{ $c.downloadSize | quote }}
{{- else }}
  emptyDir:
    sizeLimit: {{ $c.downloadSize | quote }}
{{- end }}
{{- end -}}

{{- define "dense-reward.download" -}}
{{- $c := .Values.checkpoints -}}
- name: checkpoints
  {{- if eq $c.source "s3" }}
  image: {{ $c.s3.image | quote }}
  command: [aws]
  args:
    - s3
    - sync
    - {{ $c.s3.uri | quote }}
    - {{ $c.mountPath | quote }}
    - --only-show-errors
  {{- else }}
  image: {{ include "dense-reward.image" . | quote }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  command: [sh, -ec]
  args:
    - |
      {{- .Files.Get "files/adopt.sh" | nindent 6 }}
  {{- end }}
  env:
    {{- include "dense-reward.homeEnv" . | nindent 4 }}
    {{- include "dense-reward.givenEnv" . | nindent 4 }}
    {{- if eq $c.source "s3" }}
    {{- include "dense-reward.s3Env" $c.s3 | nindent 4 }}
    {{- else }}
    {{- include "dense-reward.hubEnv" . | nindent 4 }}
    {{- end }}
  resources:
    {{- $asked := dict "cpu" "1" "memory" $c.downloadMemory "limitMemory" "" "gpu" 0 }}
    {{- $disk := ternary "" $c.downloadSize (ne $c.downloadStorageClass "") }}
    {{- include "dense-reward.resources" (merge $asked (dict "disk" $disk)) | nindent 4 }}
  securityContext:
    {{- include "dense-reward.containerSecurity" . | nindent 4 }}
  volumeMounts:
    - name: checkpoints
      mountPath: {{ $c.mountPath | quote }}
    - name: tmp
      mountPath: /tmp
{{- end -}}

{{/* The port to download from: the one in checkpoints.s3.endpointUrl, else the default port of its scheme, else 443. */}}
{{- define "dense-reward.downloadPort" -}}
{{- $url := "" -}}
{{- if eq .Values.checkpoints.source "s3" -}}
{{- $url = .Values.checkpoints.s3.endpointUrl -}}
{{- end -}}
{{- $port := regexFind ":[0-9]+$" (urlParse $url).host | trimPrefix ":" -}}
{{- default (ternary "80" "443" (hasPrefix "http:" $url)) $port -}}
{{- end -}}

{{- define "dense-reward.s3Env" -}}
{{- with .endpointUrl }}
- name: AWS_ENDPOINT_URL
  value: {{ . | quote }}
{{- end }}
{{- with .region }}
- name: AWS_REGION
  value: {{ . | quote }}
{{- end }}
{{- if .secretName }}
{{- range list "AWS_ACCESS_KEY_ID" "AWS_SECRET_ACCESS_KEY" }}
- name: {{ . | quote }}
  valueFrom:
    secretKeyRef:
      name: {{ $.secretName | quote }}
      key: {{ . | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Manifests refer to the hub's files by path, so the cache must be on the volume that the service reads. */}}
{{- define "dense-reward.hubEnv" -}}
{{- $c := .Values.checkpoints -}}
- name: HF_HOME
  value: {{ $c.mountPath }}/hub
- name: CHECKPOINTS
  value: {{ $c.mountPath | quote }}
- name: SFT
  value: {{ $c.hub.sft | quote }}
- name: SFT_FOLDER
  value: {{ $c.sft | quote }}
- name: REFERENCE
  value: {{ $c.hub.reference | quote }}
- name: REFERENCE_FOLDER
  value: {{ $c.reference | quote }}
- name: RUN_ID
  value: {{ $c.hub.runId | quote }}
- name: RENDERER
  value: {{ $c.hub.renderer | quote }}
{{- include "dense-reward.hubToken" . }}
{{- end -}}

{{- define "dense-reward.hubToken" -}}
{{- with .Values.hf_token }}
{{- if .secretName }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ .secretName | quote }}
      key: {{ .secretKey | quote }}
{{- end }}
{{- end }}
{{- end -}}
